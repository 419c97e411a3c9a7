"""What `make` runs before it serves: afterwards there is a checkpoint in the model repository.

`python -m export.provide --output DIR [--checkpoint DIR_OR_HUB_ID]`. What was exported last stays, unless another
checkpoint is named. Only the demo checkpoint is exported again by itself, when the code of the export has changed: its
weights are random anyway.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.exported import Exported, code_digest, identity, read_record
from export.model_names import ModelNames

DEMO_CHECKPOINT = ".demo/checkpoint"


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        sentence: For the person who has called.
        checkpoint: To export; None to leave the repository as it is.
    """

    sentence: str
    checkpoint: str | None = None


def make_plan(repository: Path, wanted: str, held: Exported | None, digest: str) -> Plan:
    """Decide what to export.

    Args:
        repository: To serve.
        wanted: A folder or a hub id; empty for what was exported last.
        held: What the repository holds, None for nothing.
        digest: Of the export's code today.
    """
    if held is None:
        exported = wanted or f"{DEMO_CHECKPOINT} (random weights: it sounds like noise; CHECKPOINT names another one)"
        return Plan(f"{repository} holds no checkpoint yet: exporting {exported}.", wanted or DEMO_CHECKPOINT)
    if wanted and identity(wanted) != held.checkpoint:
        return Plan(f"{repository} holds {held}: exporting {wanted} in its place, as CHECKPOINT says.", wanted)
    if held.exporter == digest:
        return Plan(f"{repository} holds {held}.")
    if held.checkpoint == identity(DEMO_CHECKPOINT):
        return Plan(f"{repository} holds {held}, and the export has changed: exporting it again.", DEMO_CHECKPOINT)
    return Plan(
        f"{repository} holds {held}, exported by other code than this; to export it again: "
        f"python -m export --checkpoint DIR_OR_HUB_ID --output {repository}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code, which is that of the export."""
    options = _parser().parse_args(arguments)
    plan = make_plan(options.output, options.checkpoint, read_record(options.output, ModelNames()), code_digest())
    print(plan.sentence, flush=True)
    return 0 if plan.checkpoint is None else _export(plan.checkpoint, options.output)


def _export(checkpoint: str, output: Path) -> int:
    # Imported only here: PyTorch takes seconds, and mostly there is nothing to export.
    from export import __main__, demo

    if identity(checkpoint) == identity(DEMO_CHECKPOINT):
        demo.main(["--output", DEMO_CHECKPOINT])
    return __main__.main([f"--checkpoint={checkpoint}", f"--output={output}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.provide", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the model repository")
    parser.add_argument(
        "--checkpoint", default="", metavar="DIR_OR_HUB_ID", help="default: what was exported last, else the demo's"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
