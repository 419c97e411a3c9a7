"""Model repositories to measure: exports of new checkpoints, and copies with other parameters."""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from export.checkpoint import Checkpoint
from export.demo import write_checkpoint
from export.repository import export_checkpoint


def export_new_checkpoint(folder: Path, size: str = "demo") -> Path:
    """Make a checkpoint and export it, both inside `folder`; return the model repository."""
    checkpoint, repository = folder / "checkpoint", folder / "repository"
    write_checkpoint(checkpoint, size=size)
    export_checkpoint(Checkpoint.find(str(checkpoint)), repository, on_start=print, on_done=lambda *_: None)
    shutil.rmtree(checkpoint)
    return repository


Edit = Callable[[str], str]
"""From the text of a configuration to another."""


def parameter(key: str, value: str) -> Edit:
    """Return what sets a parameter, whether the configuration has it already or not."""

    def edit(config: str) -> str:
        pattern = rf'(key: "{re.escape(key)}" value: {{ string_value: )"[^"]*"'
        config, count = re.subn(pattern, rf'\g<1>"{value}"', config)
        if count:
            return config
        return f'{config}parameters [ {{ key: "{key}" value: {{ string_value: "{value}" }} }} ]\n'

    return edit


def refuse_nothing() -> dict[str, list[Edit]]:
    """Return what lets in and queues as much as a benchmark sends, by model."""
    budgets = ("max_live_text_tokens", "max_live_rows", "max_live_audio_s")
    return {
        "tokenizer": [parameter(name, "1000000") for name in budgets],
        "unet": [parameter("max_queue_size", "1000000")],
    }


def instances(count: int) -> Edit:
    """Return what sets the number of a model's instances."""
    return lambda config: re.sub(r"instance_group \[ { count: \d+", f"instance_group [ {{ count: {count}", config)


def copy_with(repository: Path, copy: Path, edits: Mapping[str, Sequence[Edit]]) -> Path:
    """Copy a repository, with hard links to its weights, and edit configurations, by model; return `copy`."""
    shutil.copytree(repository, copy, copy_function=os.link)
    for model, changes in edits.items():
        path = copy / model / "config.pbtxt"
        config = path.read_text()
        for change in changes:
            config = change(config)
        path.unlink()  # the link, so that the original stays as it is
        path.write_text(config)
    return copy
