"""Reads an AudioLDM 2 checkpoint in the layout of diffusers, one component at a time."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from export.checkpoint_files import (
    CheckpointError,
    Weights,
    check_tokenizer,
    explained,
    find_weights,
    make_sentencepiece_readable,
    read_json,
    weights_patterns,
)
from export.checkpoint_sizes import check_sizes
from export.download_notice import announce_download

__all__ = ["COMPONENT_CLASSES", "MODEL_INDEX", "Checkpoint", "CheckpointError"]

MODEL_INDEX = "model_index.json"

COMPONENT_CLASSES: dict[str, tuple[str, ...]] = {
    "text_encoder": ("ClapModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "tokenizer": ("RobertaTokenizer", "RobertaTokenizerFast"),
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
    "feature_extractor": ("ClapFeatureExtractor",),
    "projection_model": ("AudioLDM2ProjectionModel",),
    "language_model": ("GPT2Model", "GPT2LMHeadModel"),
    "unet": ("AudioLDM2UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "vocoder": ("SpeechT5HifiGan",),
    "scheduler": tuple(scheduler.name for scheduler in diffusers.schedulers.KarrasDiffusionSchedulers),
}
"""The classes that each entry of `model_index.json` may name. Nothing else is ever imported, whatever the file says."""

OLD_TOKENIZER_FILES = {"tokenizer": ("vocab.json", "merges.txt"), "tokenizer_2": ("spiece.model",)}
"""What a tokenizer consists of where there is no tokenizer.json."""

CONFIG_FILES = {"feature_extractor": "preprocessor_config.json", "scheduler": "scheduler_config.json"}
"""Where a configuration isn't named config.json."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, read only; `find` gives one whose files have been checked."""

    folder: Path

    @classmethod
    def find(cls, name: str, say: Callable[[str], object] = lambda _: None) -> "Checkpoint":
        """Open the folder `name`, or download the hub's repository of that name.

        Args:
            name: A folder or a hub id.
            say: Called with a sentence about size and licence before a download.

        Raises:
            CheckpointError: Neither exists, or it isn't an AudioLDM 2 checkpoint.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            if name.startswith((".", "/", "~")) or name.count("/") > 1:
                raise CheckpointError(f"--checkpoint {name}: the folder {folder} does not exist.")
            folder = _download(name, say)
        checkpoint = cls(folder)
        checkpoint.check()
        return checkpoint

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`."""
        path = self.folder / MODEL_INDEX
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist: a checkpoint is a folder in diffusers' layout, with {MODEL_INDEX} in it."
            )
        return read_json(path)

    def check(self) -> None:
        """Raise CheckpointError unless this is an AudioLDM 2 checkpoint with all its files. Loads no weights."""
        self.check_configs()
        for component in self.models():
            self._weights(component).check()

    def check_configs(self) -> None:
        """Do the part of `check` that needs no weights."""
        pipeline = self.index.get("_class_name")
        if pipeline != "AudioLDM2Pipeline":
            raise CheckpointError(
                f"{self.folder / MODEL_INDEX} is for {pipeline}: only AudioLDM2Pipeline is supported."
            )
        for component in COMPONENT_CLASSES:
            self.class_name(component)
        for component in COMPONENT_CLASSES:
            if component in OLD_TOKENIZER_FILES:
                check_tokenizer(self.folder / component, OLD_TOKENIZER_FILES[component])
            else:
                self._config_values(component)
        check_sizes({component: self._config(component) for component in self.models()}, self._config_path)

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
        loaded_class, folder = self._class(component), self.folder / component
        if issubclass(loaded_class, torch.nn.Module):
            return self._load_model(component)
        if not (folder / "tokenizer.json").exists() and (folder / "spiece.model").exists():
            make_sentencepiece_readable()
        with explained(folder, folder, loaded_class):
            return loaded_class.from_pretrained(folder, local_files_only=True)

    def _load_model(self, component: str) -> torch.nn.Module:
        loaded_class, weights = self._class(component), self._weights(component)
        with (
            weights.alone(self._config_values(component)) as folder,
            explained(self.folder / component, folder, loaded_class),
        ):
            model, report = loaded_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=weights.use_safetensors,
                output_loading_info=True,
                **_precision(loaded_class),
            )
        # What a checkpoint lacks would be random numbers, at best with a warning. Buffers have values of their own.
        missing = sorted(set(report["missing_keys"]) & dict(model.named_parameters()).keys())
        if missing:
            raise CheckpointError(f"{weights.file} lacks {len(missing)} tensors, {missing[0]} for one.")
        return model.eval()

    def _class(self, component: str) -> Any:
        name = self.class_name(component)
        return getattr(transformers, name, None) or getattr(diffusers, name)

    def models(self) -> list[str]:
        """The components that have weights."""
        return [component for component in COMPONENT_CLASSES if issubclass(self._class(component), torch.nn.Module)]

    def library(self, component: str) -> str:
        """Return which library the model's class is from: diffusers or transformers."""
        return "diffusers" if issubclass(self._class(component), diffusers.ModelMixin) else "transformers"

    def _weights(self, component: str) -> Weights:
        return find_weights(self.folder / component, self.library(component))

    def _config_path(self, component: str) -> Path:
        return self.folder / component / CONFIG_FILES.get(component, "config.json")

    def _config_values(self, component: str) -> dict[str, Any]:
        values = read_json(self._config_path(component))
        if values.get("quantization_config") is not None:
            raise CheckpointError(f"{self._config_path(component)} is of quantized weights, which aren't supported.")
        return values

    def _config(self, component: str) -> Any:
        """The component's configuration with its class's defaults for what the file leaves out."""
        values, model_class = self._config_values(component), self._class(component)
        if self.library(component) == "diffusers":
            parameters = inspect.signature(model_class.__init__).parameters.values()
            defaults = {each.name: None if each.default is each.empty else each.default for each in parameters}
            return SimpleNamespace(**defaults | values)
        path = self._config_path(component)
        with explained(path, path, model_class.config_class):
            return model_class.config_class.from_dict(values)


def _precision(model_class: type) -> dict[str, Any]:
    if issubclass(model_class, diffusers.ModelMixin):
        return {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    return {"dtype": torch.float32}


def _download(name: str, say: Callable[[str], object]) -> Path:
    """Download what a checkpoint consists of; no code, and of each model's weights one form only.

    `DiffusionPipeline.download` isn't for us: where model_index.json names a community pipeline, it fetches and runs
    that one's code, and it leaves weights out that exist as a variant only.
    """
    small = [f"{component}/{file}" for component in COMPONENT_CLASSES for file in ("*.json", "*.txt", "spiece.model")]
    folder = _snapshot(name, [MODEL_INDEX, *small])
    checkpoint = Checkpoint(folder)
    checkpoint.check_configs()
    forms = {component: weights_patterns(component, checkpoint.library(component)) for component in checkpoint.models()}
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
    except Exception as error:  # those of the hub's HTTP library are no OSErrors
        reason = f"the download from the hub failed ({type(error).__name__})"
    raise CheckpointError(f"--checkpoint {name}: {reason}.")
