"""Ends this process when the one that started it dies, however it dies.

Triton starts each Python model as a process. One that computes, or waits for Triton under a lock, doesn't notice that
tritonserver was killed, and would stay for ever, with its memory.
"""

import os
import select
import threading
import time

POLL_S = 0.5
EXIT_STATUS = 1


def end_with_parent() -> None:
    """End this process, without any clean-up, as soon as its parent is dead. Starts a thread and returns."""
    threading.Thread(target=_end_with, args=[os.getppid()], name="parent-death", daemon=True).start()


def _end_with(parent_pid: int) -> None:
    _wait_for_end(parent_pid)
    os._exit(EXIT_STATUS)


def _wait_for_end(parent_pid: int) -> None:
    try:
        parent = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        return
    except OSError:  # a kernel before 5.3, or a sandbox that forbids it
        _poll(parent_pid)
        return
    try:
        if os.getppid() == parent_pid:  # otherwise the id may already be another process's
            ended = select.poll()
            ended.register(parent, select.POLLIN)
            ended.poll()
    finally:
        os.close(parent)


def _poll(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
