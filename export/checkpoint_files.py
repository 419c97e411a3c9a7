"""The files of one component of a checkpoint: which forms they may have, whether they are complete, what to load."""

import contextlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from export.errors import CheckpointError

WEIGHTS_NAMES = {
    "transformers": ("model.safetensors", "pytorch_model.bin"),
    "diffusers": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
}
"""What the libraries call a model's weights, the better form first."""

VARIANTS = ("", ".fp16")
"""Of the weights, in the files' names; full precision comes first."""

LOADER_OPTIONS = {"_attn_implementation", "attn_implementation", "transformers_weights", "auto_map"}
"""Keys with which a configuration could have code fetched from the hub, or other files loaded than those checked."""


@dataclass(frozen=True)
class Weights:
    """The weights of one model, in one form.

    Attributes:
        name: What the model's library calls `file`, without the variant.
        file: The weights, or the index that names the shards.
        shards: The files beside an index; none where `file` holds the weights.
    """

    name: str
    file: Path
    shards: tuple[Path, ...] = ()

    @property
    def use_safetensors(self) -> bool:
        """Tell whether these are safetensors; otherwise they are a pickle, for torch's restricted unpickler only."""
        return ".safetensors" in self.name

    def check(self) -> None:
        """Raise CheckpointError unless every file is there and complete, PermissionError if one may not be read."""
        for path in self.shards or (self.file,):
            if not path.is_file():
                raise CheckpointError(f"{path} does not exist, and {self.file.name} names it.")
            path.open("rb").close()  # tells a file that may not be read from one that is damaged
            if self.use_safetensors and not _is_complete_safetensors(path):
                raise CheckpointError(
                    f"{path} is damaged or incomplete: download it again (with Git LFS, if it is from a clone)."
                )
            if not self.use_safetensors and not _holds_only_tensors(path):
                raise CheckpointError(f"{path} is damaged, or holds more than tensors: it could run code when read.")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, without reading any."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.shards or (self.file,):
            if self.use_safetensors:
                with safe_open(path, framework="numpy") as tensors:
                    shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            else:
                shapes |= {name: tuple(tensor.shape) for name, tensor in _unpickled(path).items()}
        return shapes

    @contextlib.contextmanager
    def alone(self, config: dict[str, Any]) -> Iterator[Path]:
        """Make a folder with `config` and these weights under the library's names, and nothing else to be found."""
        with tempfile.TemporaryDirectory(prefix="audioldm2-export-") as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(config))
            (folder / self.name).symlink_to(self.file.absolute())
            for shard in self.shards:
                (folder / shard.name).symlink_to(shard.absolute())
            yield folder


@contextlib.contextmanager
def permissions_explained() -> Iterator[None]:
    """Turn a PermissionError into a sentence that says which file it is about."""
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(
            f"{error.filename} can't be read by this user: permission denied. Allow reading it (chmod -R a+rX on the "
            f"checkpoint), or run the export as its owner."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, without LOADER_OPTIONS on any level.

    Raises:
        CheckpointError: There is no such file, or something else is in it.
        PermissionError: This user may not read it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_loader_options)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: the checkpoint is incomplete.") from None
    except PermissionError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content


def find_weights(folder: Path, library: str) -> Weights:
    """Find the weights of a model: in full precision if they are there, then as safetensors, then in one file.

    Raises:
        CheckpointError: There are none, or an index can't be read.
    """
    names = WEIGHTS_NAMES[library]
    for variant in VARIANTS:
        for name in names:
            stem, _, suffix = name.rpartition(".")
            if (single := folder / f"{stem}{variant}.{suffix}").is_file():
                return Weights(name, single)
            if (index := folder / f"{name}.index{variant}.json").is_file():
                return Weights(f"{name}.index.json", index, _shards(index))
    raise CheckpointError(
        f"{folder / names[0]} does not exist, nor {names[1]}, an index of shards, or an fp16 variant of either: the "
        f"checkpoint is incomplete."
    )


def weights_patterns(folder: str, library: str) -> list[list[str]]:
    """Return the patterns of the names that weights in `folder` may have, per form, in the order of `find_weights`."""
    forms = [(variant, *name.split(".")) for variant in VARIANTS for name in WEIGHTS_NAMES[library]]
    return [
        [f"{folder}/{stem}{variant}.{suffix}", f"{folder}/{stem}{variant}-*-of-*.{suffix}"]
        for variant, stem, suffix in forms
    ]


def check_tokenizer(folder: Path, old_files: tuple[str, ...]) -> None:
    """Raise CheckpointError unless the tokenizer is there: as tokenizer.json, or as all of `old_files`."""
    if (folder / "tokenizer.json").exists() or not all((folder / name).is_file() for name in old_files):
        try:
            read_json(folder / "tokenizer.json")
        except CheckpointError as error:
            raise CheckpointError(f"{error} Without it, {' and '.join(old_files)} would do.") from error


def _without_loader_options(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if key not in LOADER_OPTIONS}


def _shards(index: Path) -> tuple[Path, ...]:
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{index} has no weight_map from tensors to files beside it.")
    return tuple(index.parent / name for name in sorted(set(names)))


def _is_complete_safetensors(path: Path) -> bool:
    """Tell whether the header can be read, and the file has as many bytes as it says."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False


def _holds_only_tensors(path: Path) -> bool:
    try:
        _unpickled(path)
    except Exception:  # there is no end to what a bad pickle raises
        return False
    return True


def _unpickled(path: Path) -> dict[str, Any]:
    """Read a file with torch's restricted unpickler; of a zip archive the tensors' values aren't read."""
    import torch  # most checkpoints are safetensors, and don't need it here

    return torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
