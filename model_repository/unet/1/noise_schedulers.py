"""The schedulers that a checkpoint is compatible with, by the names that clients use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import DummyObject


class UnknownSchedulerError(ValueError):
    """A scheduler of that name doesn't exist here; the text lists those that do."""


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
        """Every name that `create` knows."""
        return sorted(self._classes)

    def create(self, name: str) -> SchedulerMixin:
        """Return a new scheduler, as `NAME.from_config(pipeline.scheduler.config)` would make it.

        Raises:
            UnknownSchedulerError: There is none of that name.
        """
        if name not in self._classes:
            raise UnknownSchedulerError(f"must be one of {', '.join(self.names)}, got {name!r}.")
        return self._classes[name].from_config(self._config)


def _scheduler_class(name: str) -> type[SchedulerMixin]:
    if name not in KarrasDiffusionSchedulers.__members__:
        raise UnknownSchedulerError(f"scheduler_config.json names {name}, which is not a scheduler for this model.")
    return getattr(diffusers, name)
