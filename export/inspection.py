"""Says whether the files of a model repository are as the export wrote them: which are damaged, and what repairs them.

Sizes and headers are looked at in milliseconds, however large the files are; SHA-256 sums take as long as reading all.
Only the standard library is needed.
"""

import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from export.exported import recorded
from export.manifest import (
    ExportOptions,
    FileRecord,
    Manifest,
    ManifestError,
    NewerManifestError,
    manifest_path,
    read_manifest,
    sha256_of,
)
from export.model_names import ModelNames, ensemble_of
from export.weight_headers import weights_problem

QUICK_SUM_BYTES = 128 * 2**20
"""How much is read for sums where it must be quick: a fraction of a second, and the whole demo checkpoint."""

MISSING = "is missing"

MAX_NAMED_FILES = 8

LOADED_FILES: Mapping[str, tuple[str, ...]] = {
    "text_tokenizers.py": (
        "audio_geometry.json",
        "clap_tokenizer.json",
        "scheduler_classes.json",
        "t5_tokenizer.json",
    ),
    "unet_forward.py": (
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ),
    "candidate_ranking.py": ("preprocessor_config.json",),
}
"""What a Python stage loads from its version folder, by a module that tells which stage it is."""

_TOKENIZER_MODULE = "text_tokenizers.py"
_MAX_THREADS = 4


@dataclass(frozen=True)
class Inspection:
    """What was found in a model repository.

    Attributes:
        repository: Its folder.
        manifests: The manifests that could be read, by ensemble.
        unverifiable: Why an ensemble's files can't be compared with what was exported, by ensemble: "has no manifest".
        damages: What is wrong, by path in the repository: "is missing". No file is named where all is well.
    """

    repository: Path
    manifests: Mapping[str, Manifest]
    unverifiable: Mapping[str, str]
    damages: Mapping[str, str]

    def damage_sentences(self) -> list[str]:
        """Return a sentence for each ensemble that is damaged: which files, what is wrong, which command repairs it."""
        groups: dict[str, dict[str, str]] = {}
        for path in sorted(self.damages):
            groups.setdefault(self._ensemble(path), {})[path] = self.damages[path]
        return [self._sentence(ensemble, damages) for ensemble, damages in sorted(groups.items())]

    def warning_sentences(self) -> list[str]:
        """Return a sentence for each ensemble whose files can't be compared with what was exported."""
        return [
            f"{ensemble} in {self.repository} {reason}, so that only missing files and wrong sizes of its weights are "
            f"noticed; to have all of it checked, run `{self._command(ensemble)}`."
            for ensemble, reason in self.unverifiable.items()
        ]

    def _sentence(self, ensemble: str, damages: Mapping[str, str]) -> str:
        missing = [path for path, what in damages.items() if what == MISSING]
        others = [f"{path} {what}" for path, what in damages.items() if what != MISSING]
        clauses = [f"{_and(_shortened(missing))} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
        copied = ", or copy it again from where it was exported" if ensemble in self.manifests else ""
        return (
            f"The model repository {self.repository} is {'damaged' if others else 'incomplete'}: "
            f"{_and([*clauses, *_shortened(others)])}; run `{self._command(ensemble)}`{copied}."
        )

    def _ensemble(self, path: str) -> str:
        """Return the ensemble to export again for a damaged file."""
        for ensemble, manifest in self.manifests.items():
            if any(file == path or file.startswith(f"{path}/") for file in manifest.files):
                return ensemble
        return ensemble_of(path.split("/")[0])

    def _command(self, ensemble: str) -> str:
        manifest = self.manifests.get(ensemble)
        options = manifest.options if manifest else _recorded_options(self.repository, ensemble)
        return options.command(self.repository)


def inspect(repository: Path, sum_bytes: int | None = None, also_missing: Iterable[str] = ()) -> Inspection:
    """Look for damaged files in a model repository.

    What can be told in no time comes first: missing files, then sizes, the headers of the weights, and SHA-256 sums.
    Where one of them finds something, the later ones aren't asked.

    Args:
        repository: A folder of models. What no export has written is left alone, and so is what lies beside it.
        sum_bytes: How many bytes are read to compare sums, from the smallest file on; None reads all.
        also_missing: Paths in the repository that are known to be missing.

    Raises:
        OSError: Something can't be read; `filename` tells what.
    """
    manifests, unverifiable, damages = _read_manifests(repository)
    files = {path: record for manifest in manifests.values() for path, record in manifest.files.items()}
    unlisted = frozenset(_unlisted_files(repository, files))
    damages |= dict.fromkeys(also_missing, MISSING)
    damages |= dict(_missing(repository, path) for path in unlisted if not (repository / path).exists())
    damages |= dict(_size_damages(repository, files))
    if not damages:
        damages = dict(_content_damages(repository, [*files, *sorted(unlisted)], unlisted))
    if not damages:
        damages = dict(_sum_damages(repository, _smallest(files, sum_bytes)))
    return Inspection(repository, manifests, unverifiable, damages)


def _read_manifests(repository: Path) -> tuple[dict[str, Manifest], dict[str, str], dict[str, str]]:
    """Return manifests, reasons why there is none, both by ensemble, and damages."""
    manifests, unverifiable, damages = {}, {}, {}
    for ensemble, path in _manifest_places(repository):
        try:
            manifest = read_manifest(path)
            if manifest.options.name != ensemble:
                raise ManifestError(f"is that of {manifest.options.name}")
            manifests[ensemble] = manifest
        except FileNotFoundError:
            if path.with_name(_TOKENIZER_MODULE).exists():
                unverifiable[ensemble] = "has no manifest (an older version exported it)"
        except NewerManifestError:
            unverifiable[ensemble] = "has a manifest of a newer version"
        except ManifestError as error:
            damages[_relative(path, repository)] = str(error)
    return manifests, unverifiable, damages


def _manifest_places(repository: Path) -> Iterator[tuple[str, Path]]:
    """Give each ensemble that has a tokenizer, and where its manifest should be."""
    models = {folder.name for folder in repository.iterdir()}  # unlike `glob`, it tells what can't be read
    for ensemble in sorted({ensemble_of(model) for model in models}):
        if (names := ModelNames(ensemble)).of("tokenizer") in models:
            yield ensemble, manifest_path(repository, names)


def _recorded_options(repository: Path, ensemble: str) -> ExportOptions:
    """Return what is known of an export without a manifest."""
    checkpoint = recorded(repository, ModelNames(ensemble)).checkpoint
    return ExportOptions(checkpoint, ensemble) if checkpoint else ExportOptions(name=ensemble)


def _unlisted_files(repository: Path, listed: Collection[str]) -> Iterator[str]:
    """Give what stages load and no manifest lists: ONNX files that are there, and all that a Python stage needs."""
    for version in sorted(repository.glob("*/[1-9]*")):
        needed = [name for module, names in LOADED_FILES.items() if (version / module).exists() for name in names]
        for path in (*(version / name for name in needed), *version.glob("*.onnx")):
            if (relative := _relative(path, repository)) not in listed:
                yield relative


def _size_damages(repository: Path, files: Mapping[str, FileRecord]) -> Iterator[tuple[str, str]]:
    for path, record in files.items():
        place = repository / path
        try:
            status = place.stat()
        except (FileNotFoundError, NotADirectoryError):
            yield _missing(repository, path)
            continue
        if not stat.S_ISREG(status.st_mode):
            yield path, "is not a regular file"
        elif status.st_size != record.size:
            yield path, f"has {status.st_size:,} bytes instead of {record.size:,}"


def _missing(repository: Path, path: str) -> tuple[str, str]:
    """Return the first part of a path that isn't there, and how it is missing."""
    place = repository / path
    parts = [place, *place.parents[: len(Path(path).parts) - 1]]
    first = next((part for part in reversed(parts) if not part.exists()), place)
    what = f"is a link to {first.readlink()}, which isn't there" if first.is_symlink() else MISSING
    return _relative(first, repository), what


def _content_damages(repository: Path, paths: Sequence[str], unlisted: Collection[str]) -> Iterator[tuple[str, str]]:
    """Read the headers of weights, and what is in no manifest and small."""
    for path in paths:
        place = repository / path
        if path in unlisted and not place.is_file():
            if not (place / "model.onnx").is_file():  # Triton allows a folder of this name around the file
                yield path, "is not a regular file"
        elif problem := weights_problem(place) or (path in unlisted and _json_problem(place)):
            yield path, problem


def _json_problem(path: Path) -> str:
    if path.suffix != ".json":
        return ""
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return "is damaged: it isn't JSON"
    return ""


def _smallest(files: Mapping[str, FileRecord], limit: int | None) -> dict[str, FileRecord]:
    """Return the smallest files, as many as have up to `limit` bytes together; all without a limit."""
    chosen, total = {}, 0
    for path, record in sorted(files.items(), key=lambda item: item[1].size):
        total += record.size
        if limit is not None and total > limit:
            break
        chosen[path] = record
    return chosen


def _sum_damages(repository: Path, files: Mapping[str, FileRecord]) -> Iterator[tuple[str, str]]:
    with ThreadPoolExecutor(max_workers=min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        sums = threads.map(lambda path: sha256_of(repository / path), files)
        for (path, record), digest in zip(files.items(), sums, strict=True):
            if digest != record.sha256:
                yield path, "isn't what was exported (its SHA-256 differs)"


def _relative(path: Path, repository: Path) -> str:
    return path.relative_to(repository).as_posix()


def _shortened(items: Sequence[str]) -> list[str]:
    rest = len(items) - MAX_NAMED_FILES
    return [*items[:MAX_NAMED_FILES], f"{rest} more"] if rest > 0 else list(items)


def _and(items: Sequence[str]) -> str:
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last
