"""Reads an AudioLDM 2 checkpoint in the layout of diffusers, one component at a time."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

MODEL_INDEX = "model_index.json"

COMPONENT_CLASSES: dict[str, tuple[str, ...]] = {
    "tokenizer": ("RobertaTokenizer", "RobertaTokenizerFast"),
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
    "feature_extractor": ("ClapFeatureExtractor",),
    "text_encoder": ("ClapModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "projection_model": ("AudioLDM2ProjectionModel",),
    "language_model": ("GPT2Model", "GPT2LMHeadModel"),
    "unet": ("AudioLDM2UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "vocoder": ("SpeechT5HifiGan",),
    "scheduler": tuple(scheduler.name for scheduler in diffusers.schedulers.KarrasDiffusionSchedulers),
}
"""The classes that each entry of `model_index.json` may name. Nothing else is ever imported, whatever the file says."""


class CheckpointError(Exception):
    """The checkpoint can't be found, or isn't one that can be exported; the text says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose `model_index.json` has been checked."""

    folder: Path

    @classmethod
    def find(cls, name: str) -> "Checkpoint":
        """Open the folder `name`, or download the hub's repository of that name.

        Raises:
            CheckpointError: Neither exists, or it isn't an AudioLDM 2 checkpoint.
        """
        folder = Path(name) if Path(name).is_dir() else _download(name)
        checkpoint = cls(folder)
        checkpoint.check()
        return checkpoint

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`."""
        path = self.folder / MODEL_INDEX
        try:
            index = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} does not exist: a checkpoint is a folder in diffusers' layout, with {MODEL_INDEX} in it."
            ) from None
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
        if not isinstance(index, dict):
            raise CheckpointError(f"{path} holds no JSON object.")
        return index

    def check(self) -> None:
        """Raise CheckpointError unless every component is named, of a known class, and has its folder."""
        pipeline = self.index.get("_class_name")
        if pipeline != "AudioLDM2Pipeline":
            raise CheckpointError(
                f"{self.folder / MODEL_INDEX} is for {pipeline}: only AudioLDM2Pipeline is supported."
            )
        for component, known in COMPONENT_CLASSES.items():
            name = self.class_name(component)
            if name not in known:
                raise CheckpointError(
                    f"{self.folder / MODEL_INDEX} names the class {name} for {component}: supported are "
                    f"{', '.join(known)}."
                )
            if not (self.folder / component).is_dir():
                raise CheckpointError(f"{self.folder / component} does not exist: the checkpoint is incomplete.")

    def class_name(self, component: str) -> str:
        """Return the class that `model_index.json` names for `component`."""
        entry = self.index.get(component)
        if not isinstance(entry, list) or len(entry) != 2:
            raise CheckpointError(f"{self.folder / MODEL_INDEX} has no entry for {component}.")
        return str(entry[1])

    def load(self, component: str) -> Any:
        """Load one component; models come in float32, on the CPU, ready for inference.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        name = self.class_name(component)
        loaded_class = getattr(transformers, name, None) or getattr(diffusers, name)
        try:
            loaded = loaded_class.from_pretrained(
                self.folder / component, local_files_only=True, **_model_options(loaded_class)
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.folder / component} can't be loaded as {name}: {error}") from error
        return loaded.eval() if isinstance(loaded, torch.nn.Module) else loaded


def _model_options(loaded_class: type) -> dict[str, Any]:
    if issubclass(loaded_class, diffusers.ModelMixin):
        return {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    if issubclass(loaded_class, transformers.PreTrainedModel):
        return {"dtype": torch.float32}
    return {}


def _download(name: str) -> Path:
    try:
        return Path(DiffusionPipeline.download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"--checkpoint {name}: there is no such folder, and the hub gave no repository of that name "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})."
        ) from error
