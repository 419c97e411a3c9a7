"""Makes the schedulers that a checkpoint is compatible with."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from denoising_errors import UnknownSchedulerError
from diffusers import SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import DummyObject


class NoiseSchedulers:
    """Makes schedulers from the configuration that the checkpoint came with.

    Args:
        config: The checkpoint's `scheduler_config.json`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        own_class = _scheduler_class(self._config["_class_name"])
        self._classes = {
            scheduler.__name__: scheduler
            for scheduler in own_class.from_config(self._config).compatibles
            # diffusers puts a dummy where a scheduler's own dependency isn't installed.
            if not isinstance(scheduler, DummyObject)
        }

    @classmethod
    def load(cls, path: Path) -> "NoiseSchedulers":
        """Read `scheduler_config.json`."""
        return cls(json.loads(path.read_text()))

    @property
    def names(self) -> list[str]:
        """Every class that `create` knows."""
        return sorted(self._classes)

    def create(self, name: str, options: Mapping[str, Any], seed: int) -> SchedulerMixin:
        """Return a new scheduler, as `NAME.from_config(pipeline.scheduler.config, **options)` would make it.

        Args:
            name: A class of diffusers.
            options: What differs from the checkpoint's configuration, such as `use_karras_sigmas`.
            seed: Of the noise that DPMSolverSDEScheduler draws by itself; the others draw theirs in the loop.

        Raises:
            UnknownSchedulerError: There is no such class or option.
        """
        if name not in self._classes:
            raise UnknownSchedulerError(f"scheduler must be one of {', '.join(self.names)}, got {name!r}.")
        known = inspect.signature(self._classes[name]).parameters
        if unknown := sorted(options.keys() - known.keys()):
            raise UnknownSchedulerError(f"scheduler {name} has no option {unknown[0]!r}; it has {', '.join(known)}.")
        own_noise = {"noise_sampler_seed": seed} if "noise_sampler_seed" in known else {}
        try:
            return self._classes[name].from_config(self._config, **options, **own_noise)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise UnknownSchedulerError(f"scheduler {name} can't be made with {dict(options)}: {error}.") from error


def _scheduler_class(name: str) -> type[SchedulerMixin]:
    if name not in KarrasDiffusionSchedulers.__members__:
        raise UnknownSchedulerError(f"scheduler_config.json names {name}, which is not a scheduler for this model.")
    return getattr(diffusers, name)
