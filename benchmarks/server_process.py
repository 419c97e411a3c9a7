"""The server as it is run in production, `python -m server`, in processes apart from what measures it."""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.report import ROOT

STOP_TIMEOUT_S = 60.0
POLL_S = 0.05
LOG_LINES = 40
"""So many are shown when a measurement fails."""
_READY = re.compile(r"Ready: http://(\S+) grpc://(\S+) metrics http://(\S+)/metrics")


@dataclass(frozen=True)
class Address:
    """Where a running server is.

    Attributes:
        http: `HOST:PORT`, as the next two.
        grpc: Of gRPC.
        metrics: Of the metrics.
        pid: Of the process that started all its others.
    """

    http: str
    grpc: str
    metrics: str
    pid: int


class ServerProcess:
    """`python -m server` with a temporary folder of its own.

    It is a context manager; where its block fails, the end of the server's log is shown.

    Args:
        repository: What it serves.
        folder: Its temporary folder and its log go there.

    Raises:
        RuntimeError: It doesn't start; the text is what it wrote.
    """

    def __init__(self, repository: Path, folder: Path) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="t", dir=folder))
        self._log, self._output = self.temporary.with_suffix(".log"), self.temporary.with_suffix(".out")
        ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
        with self._log.open("wb") as log, self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server", "--model-repository", str(repository), "--verbose", *ports],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self.temporary)},
                stdout=output,
                stderr=log,
            )
        while not (ready := _READY.search(self.request_lines())):
            if self._process.poll() is not None:
                raise RuntimeError(f"The server didn't start: {self.log_text()}")
            time.sleep(POLL_S)
        self.address = Address(ready[1], ready[2], ready[3], self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None:
            print("\n".join(self.log_text().splitlines()[-LOG_LINES:]), file=sys.stderr)

    def log_text(self) -> str:
        """Return all that it and Triton have logged, requests apart."""
        return self._log.read_text(errors="replace")

    def request_lines(self) -> str:
        """Return a line for each request, and what else it has said on standard output."""
        return self._output.read_text(errors="replace")

    def stop(self) -> int:
        """End it, and return its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        finally:
            self._process.kill()
