"""Which checkpoint a model repository holds: a note beside each ensemble, written by the export."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from export.model_names import ENSEMBLE

NOTE = Path("1", "checkpoint.json")
"""In the ensemble's folder, which has no other files of the export."""


@dataclass(frozen=True)
class Exported:
    """What was exported last.

    Attributes:
        checkpoint: The hub id, or the absolute path of the folder; empty where nothing tells.
        exporter: Digest of the code that exported it.
    """

    checkpoint: str = ""
    exporter: str = ""

    def __str__(self) -> str:
        return self.checkpoint or "a checkpoint of which no name was kept"


def identity(checkpoint: str) -> str:
    """Return what `--checkpoint` names, wherever it is called from: an absolute path, or a hub id as it is."""
    folder = Path(checkpoint).expanduser()
    is_path = folder.is_dir() or checkpoint.startswith((".", "/", "~"))
    return str(folder.resolve()) if is_path else checkpoint


def write_note(repository: Path, checkpoint: str, ensemble: str = ENSEMBLE) -> None:
    """Note what the ensemble was exported from: a folder, or a hub id."""
    note = repository / ensemble / NOTE
    note.write_text(json.dumps(asdict(Exported(identity(checkpoint), code_digest())), indent=2) + "\n")


def read_note(repository: Path, ensemble: str = ENSEMBLE) -> Exported | None:
    """Return what the ensemble was exported from; None where there are no weights."""
    if not any(repository.glob("*/1/model.onnx")):
        return None
    try:
        return Exported(**json.loads((repository / ensemble / NOTE).read_text()))
    except (OSError, ValueError, TypeError):
        return Exported()


def code_digest() -> str:
    """Return a digest of the export's code."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:16]
