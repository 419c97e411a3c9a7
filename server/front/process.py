"""The front as the runner sees it: a process that takes orders (server/front/__main__.py has the protocol)."""

import contextlib
import os
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServerError
from server.front.envoy import Endpoints, find_envoy
from server.workspace import make_private_folder

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
LOG_TAIL_BYTES = 4000
LONGEST_PATH = 80
"""Characters of the folder's path. That of a Unix socket has at most 107."""
FAULT = "fault "


@dataclass(frozen=True)
class FrontOptions:
    """What the front is started with.

    Attributes:
        http: `HOST:PORT` on which callers reach it, as the next two.
        grpc: For gRPC.
        metrics: For Prometheus.
        models: Public models.
        jobs_models: The job boards among them.
        exposes_internals: Whether everything else can be reached, too.
    """

    http: str
    grpc: str
    metrics: str
    models: tuple[str, ...]
    jobs_models: tuple[str, ...]
    exposes_internals: bool


class FrontFolder:
    """A private folder with the sockets between Envoy, the door and Triton; it outlives a restart of any of them."""

    def __init__(self) -> None:
        self.path = make_private_folder(LONGEST_PATH)

    def socket(self, name: str) -> str:
        """Return the address of a socket."""
        return f"unix:{self.path / name}"

    def remove_sockets(self, prefix: str) -> None:
        """Remove the sockets that a process has left, so that the next one can make them."""
        for path in self.path.glob(f"{prefix}*"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)


class FrontProcess:
    """A running front.

    Args:
        options: What it is started with.
        folder: Where its sockets are, and those of Triton.
        triton_http: Address of Triton's HTTP.
        triton_grpc: Address of its gRPC.
        triton_metrics: Address of its metrics.

    Raises:
        ServerError: It can't be started.
    """

    def __init__(
        self, options: FrontOptions, folder: FrontFolder, triton_http: str, triton_grpc: str, triton_metrics: str
    ) -> None:
        find_envoy()
        for name in ("door", "admin"):
            (folder.path / name).unlink(missing_ok=True)
        endpoints = Endpoints(
            http=options.http,
            grpc=options.grpc,
            metrics=options.metrics,
            triton_http=triton_http,
            triton_grpc=triton_grpc,
            triton_metrics=triton_metrics,
            door=folder.socket("door"),
            admin=folder.socket("admin"),
        )
        self._answers = b""
        self._log = folder.path / "front.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                _command(options, endpoints, folder.path),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                cwd=ROOT,
                env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "false"},
                start_new_session=True,
            )
        try:
            if self._wait_for("ready", START_TIMEOUT_S) is None:
                raise ServerError(self._why_not_started(), self._log_tail())
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the door, whose child Envoy is."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Say whether it runs."""
        return self._process.poll() is None

    def fault(self) -> str:
        """Return what is wrong with Triton by its answers; an empty text if nothing is."""
        while self._read(0.0):
            pass
        lines = [line for line in self._answers.decode().splitlines() if line.startswith(FAULT)]
        self._answers = b""
        return lines[0].removeprefix(FAULT) if lines else ""

    def set_unavailable(self, sentence: str) -> None:
        """Have everything refused with `sentence`; an empty one ends that."""
        self._order(f"unavailable {sentence}" if sentence else "available")

    def stop(self, timeout_s: float) -> bool:
        """Take no more generations, and wait until those that run are answered.

        Returns:
            Whether they all are.
        """
        self._order("stop")
        return self.wait_until_idle(timeout_s)

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait, after `stop`, until all requests are answered; say whether they are."""
        return self._wait_for("idle", timeout_s) is not None

    def cut(self) -> int:
        """Cancel what still runs; its callers are told that the server stops. Return how many that are."""
        self._order("cut")
        return int(self._wait_for("cut ", CLOSE_TIMEOUT_S) or 0)

    def close(self) -> None:
        """End it; nothing if it has ended."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _why_not_started(self) -> str:
        reasons = [line for line in self._log_tail().splitlines() if line.startswith("error: ")]
        return reasons[-1].removeprefix("error: ") if reasons else "The front didn't start: see its log."

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return ""

    def _order(self, line: str) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._process.stdin.fileno(), f"{' '.join(line.split())}\n".encode())

    def _wait_for(self, prefix: str, timeout_s: float) -> str | None:
        """Return what follows `prefix` in a line that it says; None if it doesn't say it in time, or has ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            for line in self._answers.decode().splitlines():
                if line.startswith(prefix):
                    return line.removeprefix(prefix)
            if not self._read(max(0.0, deadline - time.monotonic())):
                return None

    def _read(self, timeout_s: float) -> bool:
        stdout = self._process.stdout
        if stdout is None or not select.select([stdout], [], [], timeout_s)[0]:
            return False
        block = os.read(stdout.fileno(), 4096)
        self._answers += block
        return bool(block)


def _command(options: FrontOptions, endpoints: Endpoints, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "server.front"),
        *(f"--{name.replace('_', '-')}={value}" for name, value in vars(endpoints).items()),
        f"--models={','.join(options.models)}",
        f"--jobs-models={','.join(options.jobs_models)}",
        *(["--expose-internals"] if options.exposes_internals else []),
        f"--folder={folder}",
    ]
