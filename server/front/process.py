"""The front as the runner sees it: a process that takes orders (server/front/__main__.py has the protocol)."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
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
LOG = "log "


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
        on_log: Called with lines of the front's log, by a thread of its own.

    Raises:
        ServerError: It can't be started.
    """

    def __init__(
        self,
        options: FrontOptions,
        folder: FrontFolder,
        triton_http: str,
        triton_grpc: str,
        triton_metrics: str,
        on_log: Callable[[str], object],
    ) -> None:
        find_envoy()
        for name in ("door", "door_metrics", "admin"):
            (folder.path / name).unlink(missing_ok=True)
        endpoints = Endpoints(
            http=options.http,
            grpc=options.grpc,
            metrics=options.metrics,
            triton_http=triton_http,
            triton_grpc=triton_grpc,
            triton_metrics=triton_metrics,
            door=folder.socket("door"),
            door_metrics=folder.socket("door_metrics"),
            admin=folder.socket("admin"),
        )
        self._on_log = on_log
        self._answers: list[str] = []
        self._has_ended = False
        self._said = threading.Condition()
        self._log = folder.path / "front.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                _command(options, endpoints, folder.path),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "false"},
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, name="front-reader", daemon=True)
        self._reader.start()
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
        with self._said:
            lines = [line for line in self._answers if line.startswith(FAULT)]
            self._answers = []
        return lines[0].removeprefix(FAULT) if lines else ""

    def set_unavailable(self, sentence: str) -> None:
        """Have everything refused with `sentence`; an empty one ends that."""
        self._order(f"unavailable {sentence}" if sentence else "available")

    def set_restarts(self, counts: Mapping[str, int]) -> None:
        """Tell it how often each process was restarted, for its metrics."""
        self._order_numbers("restarts", counts)

    def set_processes(self, pids: Mapping[str, int]) -> None:
        """Tell it the server's processes, for its metrics."""
        self._order_numbers("processes", pids)

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
        self._reader.join(CLOSE_TIMEOUT_S)

    def _why_not_started(self) -> str:
        reasons = [line for line in self._log_tail().splitlines() if line.startswith("error: ")]
        return reasons[-1].removeprefix("error: ") if reasons else "The front didn't start: see its log."

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return ""

    def _order_numbers(self, order: str, numbers: Mapping[str, int]) -> None:
        self._order(" ".join([order, *(f"{name}={number}" for name, number in numbers.items())]))

    def _order(self, line: str) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._process.stdin.fileno(), f"{' '.join(line.split())}\n".encode())

    def _wait_for(self, prefix: str, timeout_s: float) -> str | None:
        """Return what follows `prefix` in a line that it says; None if it doesn't say it in time, or has ended."""
        with self._said:
            self._said.wait_for(lambda: self._has_ended or self._find(prefix) is not None, timeout_s)
            return self._find(prefix)

    def _find(self, prefix: str) -> str | None:
        found = (line.removeprefix(prefix) for line in self._answers if line.startswith(prefix))
        return next(found, None)

    def _read(self) -> None:
        """Read what it says until it has ended: it never waits for the rest of this process."""
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        with self._process.stdout as stdout:
            for block in stdout:
                line = block.decode(errors="replace").rstrip("\n")
                if line.startswith(LOG):
                    self._on_log(line.removeprefix(LOG))
                    continue
                with self._said:
                    self._answers.append(line)
                    self._said.notify_all()
        with self._said:
            self._has_ended = True
            self._said.notify_all()


def _command(options: FrontOptions, endpoints: Endpoints, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "server.front"),
        *(f"--{name.replace('_', '-')}={value}" for name, value in vars(endpoints).items()),
        f"--models={','.join(options.models)}",
        f"--jobs-models={','.join(options.jobs_models)}",
        *(["--expose-internals"] if options.exposes_internals else []),
        f"--folder={folder}",
    ]
