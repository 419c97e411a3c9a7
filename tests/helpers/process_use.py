"""What a server's processes take: memory at its highest, and open files."""

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server import EmbeddedServer
from server.stubs import find_stubs

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
INTERVAL_S = 0.05
MB = 1_000_000


class ProcessUse:
    """Memory and open files of tritonserver, its stubs, the door and Envoy."""

    def __init__(self, server: EmbeddedServer) -> None:
        door = server._front.pid if server._front is not None else 0  # tests alone need it
        (envoy,) = [int(pid) for pid in Path(f"/proc/{door}/task/{door}/children").read_text().split()]
        stubs = {f"stub of {stub.model}": stub.pid for stub in find_stubs(server.pid)}
        self.pids = {"tritonserver": server.pid, **stubs, "door": door, "envoy": envoy}

    def memory_mb(self) -> dict[str, float]:
        """Return the resident memory of each, shared memory included."""
        return {name: _resident_bytes(pid) / MB for name, pid in self.pids.items()}

    def num_files(self) -> dict[str, int]:
        """Return how many files each has open."""
        return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in self.pids.items()}  # noqa: PTH208

    @contextmanager
    def highest_growth(self) -> Iterator[dict[str, float]]:
        """Sample the memory until the end; what is yielded has then by how many MB each was above the start at most."""
        idle, growth = self.memory_mb(), dict.fromkeys(self.pids, 0.0)
        is_over = threading.Event()

        def sample() -> None:
            while not is_over.wait(INTERVAL_S):
                for name, megabytes in self.memory_mb().items():
                    growth[name] = max(growth[name], megabytes - idle[name])

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield growth
        finally:
            is_over.set()
            thread.join()


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    return 0
