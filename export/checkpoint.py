"""Reads an AudioLDM 2 checkpoint in the layout of diffusers, one component at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from export.checkpoint_files import (
    Weights,
    check_tokenizer,
    find_weights,
    permissions_explained,
    read_json,
    weights_patterns,
)
from export.checkpoint_schemas import COMPONENT_CLASSES, CONFIG_FILES, MODEL_INDEX, MODELS, SCHEMAS
from export.checkpoint_sizes import check_sizes
from export.config_rules import check, integer, only
from export.download_notice import announce_download
from export.errors import CheckpointError

__all__ = ["COMPONENT_CLASSES", "MODEL_INDEX", "Checkpoint", "CheckpointError"]

OLD_TOKENIZER_FILES = {"tokenizer": ("vocab.json", "merges.txt"), "tokenizer_2": ("spiece.model",)}
"""What a tokenizer consists of where there is no tokenizer.json."""

TOKENIZED_FOR = {"tokenizer": ("text_encoder", "text_config"), "tokenizer_2": ("text_encoder_2", "")}
"""Which model takes a tokenizer's tokens, and the section of its configuration that is about them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, read only; `find` gives one whose files have been checked.

    Attributes:
        folder: Where it is.
        hub_id: Where it was downloaded from, if it was.
    """

    folder: Path
    hub_id: str | None = None

    @property
    def name(self) -> str:
        """Return what tells it from other checkpoints: the hub's name, or the absolute path."""
        return self.hub_id or str(self.folder.resolve())

    @classmethod
    def find(cls, name: str, say: Callable[[str], object] = lambda _: None) -> "Checkpoint":
        """Open the folder `name`, or download the hub's repository of that name.

        Args:
            name: A folder or a hub id.
            say: Called with a sentence about size and licence before a download.

        Raises:
            CheckpointError: Neither exists, or it isn't an AudioLDM 2 checkpoint.
        """
        with permissions_explained():
            folder = _expanded(name)
            if folder.is_file():
                raise CheckpointError(f"--checkpoint {name} is a file: a checkpoint is a folder with {MODEL_INDEX}.")
            checkpoint = cls(folder)
            if not folder.is_dir():
                if name.startswith((".", "/", "~")) or name.count("/") > 1:
                    raise CheckpointError(f"--checkpoint {name}: the folder {folder} does not exist.")
                checkpoint = cls(_download(name, say), hub_id=name)
            checkpoint.check()
            return checkpoint

    @cached_property
    def index(self) -> dict[str, Any]:
        """Return the content of `model_index.json`."""
        path = self.folder / MODEL_INDEX
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist: a checkpoint is a folder in diffusers' layout, with {MODEL_INDEX} in it."
            )
        return read_json(path)

    def check(self) -> None:
        """Raise CheckpointError unless this is an AudioLDM 2 checkpoint that can be served. Loads no weights."""
        self.check_configs()
        for component in MODELS:
            self._weights(component).check()
        # What the tables don't know, the libraries' classes may.
        from export.checkpoint_loading import check_model, check_scheduler

        self._check_tokenizers()
        for component in MODELS:
            check_model(
                self.class_name(component),
                self._config_path(component),
                self.values(component),
                self._weights(component),
            )
        check_scheduler(self.class_name("scheduler"), self._config_path("scheduler"), self.values("scheduler"))

    def check_configs(self) -> None:
        """Do the part of `check` that needs no weights, nor the libraries that take seconds to import."""
        pipeline = self.index.get("_class_name")
        if pipeline != "AudioLDM2Pipeline":
            raise CheckpointError(
                f"{self.folder / MODEL_INDEX} is for {pipeline}: only AudioLDM2Pipeline is supported."
            )
        for component in COMPONENT_CLASSES:
            self.class_name(component)
        for component, files in OLD_TOKENIZER_FILES.items():
            check_tokenizer(self.folder / component, files)
        check_sizes({component: self.config(component) for component in COMPONENT_CLASSES}, self._config_path)

    def _check_tokenizers(self) -> None:
        """Check what the tokenizers have become from their several files, and that the models know their tokens."""
        from export.checkpoint_loading import load_files

        for component, (model, section) in TOKENIZED_FOR.items():
            folder, model_path = self.folder / component, self._config_path(model)
            tokenizer = load_files(self.class_name(component), folder)
            schema, config = SCHEMAS[component], self.config(model)
            schema.read({key: getattr(tokenizer, key) for key in schema.keys}, folder / "tokenizer.json")
            known = config[section] if section else config
            prefix = f"{section}." if section else ""
            largest = max(tokenizer.get_vocab().values())
            check(
                f"{prefix}vocab_size",
                known["vocab_size"],
                integer(largest + 1, why=f", for the tokens of {folder}"),
                model_path,
            )
            if "pad_token_id" in known:
                check(
                    f"{prefix}pad_token_id",
                    known["pad_token_id"],
                    only(tokenizer.pad_token_id, f", which is {tokenizer.pad_token} in {folder}"),
                    model_path,
                )

    def config(self, component: str) -> dict[str, Any]:
        """Return what SCHEMAS knows of the component's configuration, checked, with defaults."""
        return SCHEMAS[component].read(self.values(component), self._config_path(component))

    def class_name(self, component: str) -> str:
        """Return the class that `model_index.json` names for `component`, one of COMPONENT_CLASSES."""
        entry, known = self.index.get(component), COMPONENT_CLASSES[component]
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            raise CheckpointError(f"{self.folder / MODEL_INDEX} has no entry for {component}.")
        name = entry[1]
        if name == "VitsModel":
            raise CheckpointError(
                f"{self.folder / MODEL_INDEX} names VitsModel for {component}: speech checkpoints aren't supported yet."
            )
        if name not in known:
            raise CheckpointError(
                f"{self.folder / MODEL_INDEX} names the class {name} for {component}: supported are {', '.join(known)}."
            )
        return str(name)

    def load(self, component: str) -> Any:
        """Load one component; models come in float32, on the CPU, ready for inference.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        # Here, so that a wrong checkpoint is told before the seconds that these libraries take to import.
        from export.checkpoint_loading import load_files, load_model

        name, folder = self.class_name(component), self.folder / component
        if component not in MODELS:
            return load_files(name, folder)
        return load_model(name, folder, self.values(component), self._weights(component))

    def _weights(self, component: str) -> Weights:
        return find_weights(self.folder / component, MODELS[component])

    def _config_path(self, component: str) -> Path:
        return self.folder / component / CONFIG_FILES.get(component, "config.json")

    def values(self, component: str) -> dict[str, Any]:
        """Return the content of the component's configuration file."""
        path = self._config_path(component)
        if component in OLD_TOKENIZER_FILES and not path.exists():
            return {}
        values = read_json(path)
        if values.get("quantization_config") is not None:
            raise CheckpointError(f"{path} is of quantized weights, which aren't supported.")
        return values


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # this user has no home folder
        raise CheckpointError(f"--checkpoint {name}: {error}.") from error


def _download(name: str, say: Callable[[str], object]) -> Path:
    """Download what a checkpoint consists of; no code, and of each model's weights one form only.

    `DiffusionPipeline.download` isn't for us: where model_index.json names a community pipeline, it fetches and runs
    that one's code, and it leaves weights out that exist as a variant only.
    """
    small = [f"{component}/{file}" for component in COMPONENT_CLASSES for file in ("*.json", "*.txt", "spiece.model")]
    folder = _snapshot(name, [MODEL_INDEX, *small])
    checkpoint = Checkpoint(folder)
    checkpoint.check_configs()
    forms = {component: weights_patterns(component, library) for component, library in MODELS.items()}
    announce_download(name, [[file for form in patterns for file in form] for patterns in forms.values()], say)
    while forms:
        best = {component: patterns.pop(0) for component, patterns in forms.items()}
        _snapshot(name, [pattern for patterns in best.values() for pattern in patterns], revision=folder.name)
        forms = {
            component: patterns
            for component, patterns in forms.items()
            if patterns and not any(any(folder.glob(pattern)) for pattern in best[component])
        }
    return folder


def _snapshot(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """Download the files of the hub's repository `name` that match one of `patterns`, or find them in its cache."""
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, revision=revision))
    except HFValidationError:
        reason = "no folder has that name, and no repository on the hub can have it"
    except RepositoryNotFoundError:
        reason = "no folder has that name, and the hub has no such repository, or it needs an access token in HF_TOKEN"
    except LocalEntryNotFoundError:
        reason = "no folder has that name, and neither the hub can be reached nor does its cache here hold the files"
    except PermissionError as error:
        reason = f"its files can't be kept: {error.filename} can't be written. Set HF_HOME to a folder of this user"
    except RuntimeError as error:  # this user has no home folder
        reason = f"its files can't be kept: {error} Set HF_HOME to a folder of this user"
    except Exception as error:  # those of the hub's HTTP library are no OSErrors
        reason = f"the download from the hub failed ({type(error).__name__})"
    raise CheckpointError(f"--checkpoint {name}: {reason}.")
