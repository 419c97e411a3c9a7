"""The sections about starts: how long until the first answer, and until what is compiled is used."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.case import Case
from benchmarks.gpu.results import OutOfTimeError, Results
from benchmarks.gpu.wheels import ROOT
from benchmarks.page_cache import forget

SECOND_ANSWER, COMPILED_ANSWER = "the second answer", "an answer of what is compiled"
MILESTONES = ("PyTorch is imported", "it is ready", "the first answer", SECOND_ANSWER, COMPILED_ANSWER)


def cold(case: Case, results: Results) -> None:
    """With nothing compiled, and the weights on the disk alone; until the second answer."""
    cache = case.work / "cold-inductor"
    shutil.rmtree(cache, ignore_errors=True)
    forget(case.unet_folder)
    _start(case, results, "cold", cache, until=SECOND_ANSWER)


def warm(case: Case, results: Results) -> None:
    """With the cache of an earlier start; until an answer of what is compiled."""
    _start(case, results, "warm", case.compile_cache, until=COMPILED_ANSWER)


def _start(case: Case, results: Results, name: str, cache: Path, until: str) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.first_answer", case.to_json(), str(cache)]
    started = time.time()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            for at, what in _events(process, results):
                if what in MILESTONES:
                    results.add_one(f"start/{name}/{what}", at - started, "s")
                else:
                    results.note(f"start, {name}", f"{at - started:.1f} s: {what}")
                if what == until:
                    return
        finally:
            process.kill()
    raise RuntimeError(f"the process ended with status {process.returncode} before {until}")


def _events(process: "subprocess.Popen[str]", results: Results) -> Iterator[tuple[float, str]]:
    """Yield the lines of its output, until the budget is used up."""
    assert process.stdout is not None  # noqa: S101 - for the type checker
    for line in process.stdout:
        if line.startswith("["):
            at, what = json.loads(line)
            yield at, what
        if results.left < 0:
            raise OutOfTimeError("0 s were left")
