"""The names by which clients choose a scheduler: a class of diffusers, or a short alias for a class with options."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Options = Mapping[str, bool | str]

KARRAS: Options = {"use_karras_sigmas": True}
SDE: Options = {"algorithm_type": "sde-dpmsolver++"}

ALIASES: dict[str, tuple[str, Options]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lms-karras": ("LMSDiscreteScheduler", KARRAS),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", KARRAS),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun-karras": ("HeunDiscreteScheduler", KARRAS),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-karras": ("KDPM2DiscreteScheduler", KARRAS),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm2-a-karras": ("KDPM2AncestralDiscreteScheduler", KARRAS),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", SDE),
    "dpm++2m-sde-karras": ("DPMSolverMultistepScheduler", {**SDE, **KARRAS}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {}),
    "dpm++2s-karras": ("DPMSolverSinglestepScheduler", KARRAS),
    "dpm++sde": ("DPMSolverSDEScheduler", {}),
    "dpm++sde-karras": ("DPMSolverSDEScheduler", KARRAS),
    "deis": ("DEISMultistepScheduler", {}),
    "deis-karras": ("DEISMultistepScheduler", KARRAS),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-karras": ("UniPCMultistepScheduler", KARRAS),
    "edm-euler": ("EDMEulerScheduler", {}),
}
"""Alias -> class, and what it sets in the checkpoint's scheduler configuration."""


class UnknownSchedulerError(ValueError):
    """There is no scheduler of that name; the text lists those that there are."""


@dataclass(frozen=True)
class SchedulerChoice:
    """A scheduler that the model `unet` can make.

    Attributes:
        class_name: Of diffusers.
        options: What differs from the checkpoint's scheduler configuration.
    """

    class_name: str
    options: Options = field(default_factory=dict)


class SchedulerNames:
    """The names that a checkpoint's clients may use.

    Args:
        classes: The classes that the checkpoint's scheduler is compatible with.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._choices = {name: SchedulerChoice(name) for name in sorted(classes)}
        self._choices |= {
            alias: SchedulerChoice(name, options) for alias, (name, options) in ALIASES.items() if name in classes
        }

    @classmethod
    def load(cls, path: Path) -> "SchedulerNames":
        """Read the JSON list of classes that `python -m export` writes."""
        return cls(json.loads(path.read_text()))

    def choose(self, name: str) -> SchedulerChoice:
        """Return what `name` stands for.

        Raises:
            UnknownSchedulerError: Nothing.
        """
        if name not in self._choices:
            raise UnknownSchedulerError(f"must be one of {', '.join(self._choices)}, got {name[:100]!r}.")
        return self._choices[name]
