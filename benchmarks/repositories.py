"""Model repositories to measure: exports of new checkpoints, and copies with other parameters."""

import os
import re
import shutil
from collections.abc import Mapping
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


def copy_with_parameters(repository: Path, copy: Path, parameters: Mapping[str, Mapping[str, str]]) -> Path:
    """Copy a repository, with hard links to its weights, and set parameters in its configurations.

    Args:
        repository: What to copy.
        copy: Where to.
        parameters: By model, then by the parameter's key. Every one must be there already.

    Returns:
        `copy`.

    Raises:
        ValueError: A configuration doesn't have the parameter.
    """
    shutil.copytree(repository, copy, copy_function=os.link)
    for model, values in parameters.items():
        path = copy / model / "config.pbtxt"
        config = path.read_text()
        for key, value in values.items():
            pattern = rf'(key: "{re.escape(key)}" value: {{ string_value: )"[^"]*"'
            config, count = re.subn(pattern, rf'\g<1>"{value}"', config)
            if count != 1:
                raise ValueError(f"{path} has no parameter {key}")
        path.unlink()  # the link, so that the original stays as it is
        path.write_text(config)
    return copy
