"""Runs the sections of the benchmark one after the other within a budget of seconds.

Each has a process of its own: what it leaves on the GPU goes with it, what it breaks there breaks no other, and it can
be ended. The processes are forks of one that has imported PyTorch and done nothing with it.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path

from benchmarks.gpu.case import Case
from benchmarks.gpu.results import NotPossibleError, OutOfTimeError, Results

Process = ForkServerProcess | SpawnProcess

GRACE_S = 10.0
"""How long beyond the budget a section may finish what it is at."""

CORES_BEHIND = 4
"""Of 8 cores and more, so many are for what goes on behind the sections."""

OK, FAILED, LEFT_OUT, FORKED_TOO_LATE = 0, 1, 2, 3


class ForkedTooLateError(Exception):
    """What was imported before the fork has used the GPU: PyTorch refuses it to forks from then on."""


@dataclass(frozen=True)
class Section:
    """A part of the benchmark.

    Attributes:
        name: For `--sections`, and for what is said of it.
        function: `MODULE:FUNCTION`; it gets the case and the results.
        needs_s: It isn't begun with fewer seconds left; of the official size.
        after: Sections without which it makes no sense.
        is_behind: It goes on behind those that follow, on cores of its own, adds no figures, and ends with the last.
    """

    name: str
    function: str
    needs_s: float = 5.0
    after: tuple[str, ...] = ()
    is_behind: bool = False


class Runner:
    """Runs sections.

    Args:
        case: What is measured.
        folder: Of the results.
        deadline: When the budget ends, on `time.time`.
        preload: Modules that all sections need.
    """

    def __init__(self, case: Case, folder: Path, deadline: float, preload: Sequence[str]) -> None:
        self._case, self._folder, self._deadline = case, folder, deadline
        self._context: ForkServerContext | SpawnContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._behind: list[Process] = []
        self._outcomes: dict[str, int] = {}

    def run(self, sections: Sequence[Section]) -> bool:
        """Run them in their order; return whether none has failed."""
        try:
            for section in sections:
                self._outcomes[section.name] = self._run(section)
        finally:
            for process in self._behind:
                _end(process)
        return FAILED not in self._outcomes.values()

    def _run(self, section: Section) -> int:
        results = Results(self._folder, self._deadline)
        if missing := [name for name in section.after if self._outcomes.get(name, OK) != OK]:
            results.note(section.name, f"left out: {', '.join(missing)} isn't there.")
            return LEFT_OUT
        if not self._case.is_rehearsal and results.left < section.needs_s:
            results.note(section.name, f"left out: {max(0.0, results.left):.0f} s were left of the budget.")
            return LEFT_OUT
        process = self._context.Process(
            target=_run_section, args=(section, self._case, self._folder, self._deadline), name=section.name
        )
        process.start()
        if section.is_behind:
            self._behind.append(process)
            return OK
        process.join(max(0.0, results.left) + GRACE_S)
        if process.exitcode == FORKED_TOO_LATE and isinstance(self._context, ForkServerContext):
            sentence = "processes are started anew instead of forked: what they import has used the GPU."
            Results(self._folder, self._deadline).note(section.name, sentence)
            self._context = multiprocessing.get_context("spawn")
            multiprocessing.set_start_method("spawn", force=True)  # for what the sections start
            return self._run(section)
        if process.exitcode is None:
            _end(process)
            Results(self._folder, self._deadline).note(
                section.name, "ended: the budget was used up, and it did not end by itself."
            )
            return LEFT_OUT
        if process.exitcode < 0 or process.exitcode > LEFT_OUT:
            Results(self._folder, self._deadline).note(
                section.name, f"failed: its process ended with status {process.exitcode}."
            )
            return FAILED
        return process.exitcode


def _run_section(section: Section, case: Case, folder: Path, deadline: float) -> None:
    """Run one section in the present process, and end the process with its outcome."""
    os.setsid()  # what it starts can be ended with it
    _keep_to_cores(behind=section.is_behind)
    module, _, function = section.function.partition(":")
    results = Results(folder, deadline)
    print(f"== {section.name}", flush=True)
    sentence, outcome = "", OK
    try:
        getattr(importlib.import_module(module), function)(case, results)
    except (NotPossibleError, ModuleNotFoundError) as error:
        sentence, outcome = f"not possible here: {error}.", LEFT_OUT
    except OutOfTimeError as error:
        sentence, outcome = f"cut short: {error} of the budget.", LEFT_OUT
    except ForkedTooLateError:
        outcome = FORKED_TOO_LATE
    except Exception as error:
        traceback.print_exc()
        sentence, outcome = f"failed: {type(error).__name__}: {str(error)[:300]}", FAILED
    if section.is_behind:  # it must not write beside the others
        _end_file(case, section.name).write_text(sentence)
    elif sentence:
        results.note(section.name, sentence)
    sys.exit(outcome)


def wait_for(case: Case, results: Results, name: str) -> None:
    """Wait for a section that goes on behind the present one.

    Raises:
        NotPossibleError: It has failed.
        OutOfTimeError: The budget is used up.
    """
    while not _end_file(case, name).exists():
        results.check_time()
        time.sleep(0.1)
    if sentence := _end_file(case, name).read_text():
        raise NotPossibleError(f"{name}: {sentence.rstrip('.')}")


def _end_file(case: Case, name: str) -> Path:
    """Return the file that says that a section has ended; what it says is why it has not done what it should."""
    return case.work / f"{name}.ended"


def _keep_to_cores(*, behind: bool) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= 2 * CORES_BEHIND:
        os.sched_setaffinity(0, cores[-CORES_BEHIND:] if behind else cores[:-CORES_BEHIND])
    if behind:
        os.nice(10)


def _end(process: Process) -> None:
    """End a section and what it has started."""
    if process.is_alive() and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):  # it may not lead a group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()
