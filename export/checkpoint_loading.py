"""Loads the components of a checkpoint with the classes of diffusers and transformers."""

import contextlib
import importlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import sentencepiece
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from export.checkpoint_files import Weights
from export.errors import CheckpointError

LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers and diffusers raise for configurations and weights that they can't take."""


DEFAULT_SCHEDULER = "DPMSolverMultistepScheduler"
"""What a request gets that names no scheduler; the model `tokenizer` says so too."""

NUM_TRIED_STEPS = 10


def component_class(name: str) -> Any:
    """Return the class of that name, one of COMPONENT_CLASSES."""
    return getattr(transformers, name, None) or getattr(diffusers, name)


def load_files(class_name: str, folder: Path) -> Any:
    """Load a tokenizer, a scheduler or a feature extractor.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    loaded_class = component_class(class_name)
    if not (folder / "tokenizer.json").exists() and (folder / "spiece.model").exists():
        _make_sentencepiece_readable()
    with _explained(folder, folder, loaded_class):
        return loaded_class.from_pretrained(folder, local_files_only=True)


def load_model(class_name: str, place: Path, values: dict[str, Any], weights: Weights) -> torch.nn.Module:
    """Load a model in float32, on the CPU, ready for inference.

    Args:
        class_name: Of the model.
        place: The component's folder, for sentences.
        values: Its configuration.
        weights: Its weights; of the folder, nothing else is read.

    Raises:
        CheckpointError: The weights aren't those of the configuration.
    """
    loaded_class = component_class(class_name)
    with weights.alone(values) as folder, _explained(place, folder, loaded_class):
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


def check_model(class_name: str, config: Path, values: Mapping[str, Any], weights: Weights) -> None:
    """Raise CheckpointError unless the model can be made and the weights have its shapes; no memory is taken for it.

    Args:
        class_name: Of the model.
        config: The file of its configuration, for sentences.
        values: The content.
        weights: Their headers are read.
    """
    model_class = component_class(class_name)
    with _explained(config, config, model_class), torch.device("meta"):
        if issubclass(model_class, diffusers.ModelMixin):
            model = model_class.from_config(dict(values))
        else:
            model = model_class(model_class.config_class.from_dict(dict(values)))
    _check_shapes(model, config, weights)


def _check_shapes(model: torch.nn.Module, config: Path, weights: Weights) -> None:
    stored = weights.shapes()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = []
    for name, shape in wanted.items():
        # The same weights may be stored with the prefix of a model with a head, or without.
        names = {name, f"{prefix}{name}", name.removeprefix(prefix)} & stored.keys()
        if not names:
            missing.append(name)
        for stored_name in names:
            if stored[stored_name] != shape:
                raise CheckpointError(
                    f"{weights.file} has {stored_name} of the shape {list(stored[stored_name])}, and by {config} it "
                    f"would be {list(shape)}: the two aren't of one model."
                )
    # The libraries know some tensors by older names too, so that a few of them say nothing yet: loading will.
    if len(missing) > len(wanted) / 2:
        raise CheckpointError(
            f"{weights.file} lacks {len(missing)} of {len(wanted)} tensors of {config}, {missing[0]} for one: the two "
            f"aren't of one model."
        )


def check_scheduler(class_name: str, path: Path, values: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the scheduler can be made, and can be replaced by the default one of requests.

    Args:
        class_name: Of the checkpoint's scheduler.
        path: The file of its configuration, for sentences.
        values: The content.
    """
    for name in (class_name, DEFAULT_SCHEDULER):
        scheduler_class = component_class(name)
        with _explained(path, path, scheduler_class):
            if not _does_steps(scheduler_class.from_config(dict(values))):
                raise ValueError("its steps lead to numbers that aren't finite")


def usable_schedulers(scheduler: Any) -> list[str]:
    """Return the classes that `scheduler` can be replaced by and that work with its configuration, by name."""
    usable = []
    for scheduler_class in scheduler.compatibles:
        # diffusers has dummies for what isn't installed.
        if isinstance(scheduler_class, diffusers.utils.DummyObject):
            continue
        with contextlib.suppress(*LOAD_ERRORS):
            scheduler_class.from_config(scheduler.config).set_timesteps(NUM_TRIED_STEPS)
            usable.append(scheduler_class.__name__)
    return sorted(usable)


def _does_steps(scheduler: Any) -> bool:
    """Tell whether a few steps on latents of zeros lead to finite numbers."""
    scheduler.set_timesteps(NUM_TRIED_STEPS)
    latents = torch.zeros(1, 1, 2, 2)
    for timestep in scheduler.timesteps:
        noise = torch.ones_like(scheduler.scale_model_input(latents, timestep))
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return bool(latents.isfinite().all())


def _precision(model_class: type) -> dict[str, Any]:
    if issubclass(model_class, diffusers.ModelMixin):
        return {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    return {"dtype": torch.float32}


@contextlib.contextmanager
def _explained(place: Path, read_from: Path, loaded_class: type) -> Iterator[None]:
    """Turn what a library says about `read_from` into a sentence about `place`."""
    try:
        yield
    except LOAD_ERRORS as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        # A line that ends with a colon is the heading of the reason.
        reason = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")
        reason = reason.replace(str(read_from), str(place))
        raise CheckpointError(f"{place} can't be loaded as {loaded_class.__name__}: {reason}.") from error


def _make_sentencepiece_readable() -> None:
    """Let transformers read spiece.model with the older protobuf that Triton's client needs.

    transformers has code for any protobuf, but takes that of the package sentencepiece, which wants a newer one.
    """
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception:  # a VersionError, which old versions of protobuf don't have
        own = importlib.import_module("transformers.utils.sentencepiece_model_pb2_new")
        sentencepiece.sentencepiece_model_pb2 = own  # type: ignore[attr-defined]  # what transformers asks for
