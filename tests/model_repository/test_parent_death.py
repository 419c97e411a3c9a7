"""A process that ends with its parent: however that one dies, and whatever the process does at the time."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import parent_death
import pytest

from tests.helpers.waiting import wait_until

FOLDER = str(Path(parent_death.__file__).parent)

CHILD = f"""
import os, sys, threading
sys.path.append({FOLDER!r})
import parent_death
{{before}}
parent_death.end_with_parent()
print(os.getpid(), flush=True)
{{doing}}
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
child.wait()
"""
IDLE = "threading.Event().wait()"
BUSY = "while True: pass"
DEAF = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); threading.Event().wait()"
NO_PIDFD = "def refuse(_): raise OSError(38, 'Function not implemented')\nos.pidfd_open = refuse"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def family(doing: str, before: str = "") -> Iterator[tuple[subprocess.Popen, int]]:
    """A parent, and the process id of its child, which is watching it."""
    child_pid = 0
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD.format(doing=doing, before=before)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        yield parent, child_pid
    finally:
        parent.kill()
        with contextlib.suppress(ProcessLookupError):
            if child_pid and is_alive(child_pid):
                os.kill(child_pid, signal.SIGKILL)
        parent.communicate()  # last: the child has its end of the pipe, too


@pytest.mark.parametrize("doing", [IDLE, BUSY, DEAF], ids=["idle", "busy", "deaf to signals"])
@pytest.mark.parametrize("before", ["", NO_PIDFD], ids=["pidfd", "an old kernel"])
def test_a_process_ends_with_its_killed_parent(doing, before):
    with family(doing, before) as (parent, child_pid):
        assert is_alive(child_pid)
        parent.kill()
        wait_until(lambda: not is_alive(child_pid), 5, "the child has ended")


def test_a_process_lives_as_long_as_its_parent():
    with family(IDLE) as (parent, child_pid):
        with pytest.raises(subprocess.TimeoutExpired):
            parent.wait(0.5)
        assert is_alive(child_pid)


def test_a_parent_that_is_dead_already_ends_the_process():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parent_death._wait_for_end(dead.pid)
    parent_death._wait_for_end(os.getpid())  # not this process's parent: its id has been given to another one
