"""Which checkpoint a model repository holds: a record in the folder of its tokenizer, which the export writes."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from export.model_names import ModelNames
from export.output_folder import VERSION


@dataclass(frozen=True)
class Exported:
    """What was exported last.

    Attributes:
        checkpoint: The hub id, or the absolute path of the folder; empty where nothing tells.
        exporter: Digest of the code that exported it.
        target: For what, one of TARGETS.
    """

    checkpoint: str = ""
    exporter: str = ""
    target: str = "cpu"

    def __str__(self) -> str:
        return self.checkpoint or "a checkpoint of which no name was kept"


def identity(checkpoint: str) -> str:
    """Return what `--checkpoint` names, wherever it is called from: an absolute path, or a hub id as it is."""
    folder = Path(checkpoint).expanduser()
    is_path = folder.is_dir() or checkpoint.startswith((".", "/", "~"))
    return str(folder.resolve()) if is_path else checkpoint


def write_record(repository: Path, names: ModelNames, checkpoint: str, target: str) -> None:
    """Record that the ensemble was exported from `checkpoint`, which is as `identity` gives it, by this code."""
    record = _record(repository, names)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(
        json.dumps(asdict(Exported(checkpoint, code_digest(), target)), indent=2) + "\n", encoding="utf-8"
    )


def read_record(repository: Path, names: ModelNames) -> Exported | None:
    """Return what the ensemble was exported from; None where there are no weights."""
    if not (repository / names.of("unet") / VERSION / "unet").exists():
        return None
    return recorded(repository, names)


def recorded(repository: Path, names: ModelNames) -> Exported:
    """Return what the record of the ensemble says, whether its weights are there or not."""
    try:
        return Exported(**json.loads(_record(repository, names).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Exported()


def code_digest() -> str:
    """Return a digest of the export's code."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:16]


def _record(repository: Path, names: ModelNames) -> Path:
    return repository / names.of("tokenizer") / VERSION / "checkpoint.json"
