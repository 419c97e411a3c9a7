"""All figures of a GPU in one call, on a machine that has PyTorch and nothing else.

`python -m benchmarks.gpu --output DIR`, from the repository's root. Weights are random, of the official size; nothing
is downloaded. What matters most comes first: 4 minutes (`--budget 240`) have it, 10 have everything. Each figure is in
DIR/gpu.json and DIR/gpu.md as soon as it is measured.

What the machine lacks comes as wheels in a folder, `--wheels DIR`; large ones may come in parts, `.part-00` and so on.
diffusers is needed; onnxruntime-gpu, nvidia-pytriton and tritonclient are for the last sections. `--rehearse` does
the same in miniature on a CPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.case import miniature, official_size
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import Runner, Section
from benchmarks.gpu.sections import NOT_REHEARSED, PRELOAD, SECTIONS
from benchmarks.gpu.smi import smi
from benchmarks.gpu.tables import is_correct
from benchmarks.gpu.wheels import join_parts, make_environment

STARTED = "AUDIOLDM2_BENCHMARK_STARTED"
"""When this call began: for the second Python, whose environment has the wheels."""

MISSING = "AUDIOLDM2_BENCHMARK_MISSING"
"""The wheels that could not be installed, and why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 1 if a section has failed or a result is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    started = float(os.environ.get(STARTED, time.time()))
    with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as folder:
        if options.wheels and STARTED not in os.environ:
            return _run_with_wheels(options.wheels, Path(folder), started, arguments)
        case = (miniature if options.rehearse else official_size)(Path(folder))
        results = Results.begin(options.output, started + options.budget, options.commit)
        if os.environ.get(MISSING):
            results.note("wheels", os.environ[MISSING])
        runner = Runner(case, options.output, started + options.budget, PRELOAD)
        no_failure = runner.run(_choose(options.sections, rehearse=options.rehearse))
    return _conclude(Results(options.output, started + options.budget), no_failure=no_failure)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets gpu.json and gpu.md")
    parser.add_argument("--budget", type=float, default=570.0, metavar="SECONDS", help="when it ends by itself")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="what the machine lacks: wheels, also in parts")
    parser.add_argument("--rehearse", action="store_true", help="the same in miniature, on a CPU; figures mean nothing")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--sections", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--commit", default="", help="what is measured, where the files come without git")
    return parser.parse_args(arguments)


def _run_with_wheels(wheels: Path, work: Path, started: float, arguments: Sequence[str]) -> int:
    """Do all of it in an environment that has the wheels."""
    python, missing = make_environment(work / "environment", join_parts(wheels, work))
    print(f"installed the wheels in {time.time() - started:.1f} s", *missing, sep="\n", flush=True)
    environment = {**os.environ, STARTED: str(started), MISSING: "; ".join(missing)}
    command = [str(python), "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def _choose(names: Sequence[str] | None, *, rehearse: bool) -> list[Section]:
    """Return the sections of some names, and those without which they make no sense."""
    if names is None:
        return [section for section in SECTIONS if not (rehearse and section.name in NOT_REHEARSED)]
    wanted = set(names)
    for section in reversed(SECTIONS):  # each comes after those that it needs
        if section.name in wanted:
            wanted.update(section.after)
    return [section for section in SECTIONS if section.name in wanted]


def _conclude(results: Results, *, no_failure: bool) -> int:
    if facts := smi():
        results.add_fact("at the end", facts)
    results.save()
    print(results.markdown_file.read_text(), flush=True)
    return 0 if no_failure and is_correct(results.errors) else 1


if __name__ == "__main__":
    sys.exit(main())
