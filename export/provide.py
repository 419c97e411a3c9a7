"""What `make` runs before it serves: afterwards there is a checkpoint in the model repository.

`python -m export.provide --output DIR [--checkpoint DIR_OR_HUB_ID] [--target gpu]`. What was exported last stays,
unless another checkpoint is named. Only the demo checkpoint is exported again by itself, when the code of the export or
the target has changed: its weights are random anyway.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.exported import Exported, code_digest, identity, read_record
from export.model_names import ModelNames
from export.target import TARGETS

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


def make_plan(repository: Path, wanted: str, held: Exported | None, digest: str, target: str) -> Plan:
    """Decide what to export.

    Args:
        repository: To serve.
        wanted: A folder or a hub id; empty for what was exported last.
        held: What the repository holds, None for nothing.
        digest: Of the export's code today.
        target: For what, one of TARGETS.
    """
    if held is None:
        exported = wanted or f"{DEMO_CHECKPOINT} (random weights: it sounds like noise; CHECKPOINT names another one)"
        return Plan(f"{repository} holds no checkpoint yet: exporting {exported}.", wanted or DEMO_CHECKPOINT)
    if wanted and identity(wanted) != held.checkpoint:
        return Plan(f"{repository} holds {held}: exporting {wanted} in its place, as CHECKPOINT says.", wanted)
    if held.exporter == digest and held.target == target:
        return Plan(f"{repository} holds {held}.")
    how = f"for a {held.target.upper()}" if held.target != target else "by other code than this"
    if held.checkpoint == identity(DEMO_CHECKPOINT):
        sentence = f"{repository} holds {held}, exported {how}: exporting it again for a {target.upper()}."
        return Plan(sentence, DEMO_CHECKPOINT)
    return Plan(
        f"{repository} holds {held}, exported {how}; to export it again: "
        f"python -m export --checkpoint DIR_OR_HUB_ID --output {repository} --target {target}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code, which is that of the export."""
    options = _parser().parse_args(arguments)
    held = read_record(options.output, ModelNames())
    plan = make_plan(options.output, options.checkpoint, held, code_digest(), options.target)
    print(plan.sentence, flush=True)
    return 0 if plan.checkpoint is None else _export(plan.checkpoint, options.output, options.target)


def _export(checkpoint: str, output: Path, target: str) -> int:
    # Imported only here: PyTorch takes seconds, and mostly there is nothing to export.
    from export import __main__, demo

    if identity(checkpoint) == identity(DEMO_CHECKPOINT):
        demo.main(["--output", DEMO_CHECKPOINT])
    return __main__.main([f"--checkpoint={checkpoint}", f"--output={output}", f"--target={target}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.provide", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the model repository")
    parser.add_argument(
        "--checkpoint", default="", metavar="DIR_OR_HUB_ID", help="default: what was exported last, else the demo's"
    )
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="what it will run on (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
