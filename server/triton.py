"""One tritonserver from its start to its end."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServerError
from server.installation import Installation
from server.leftovers import JOB_BOARD_PREFIX, region_prefix
from server.local_http import answers
from server.process import SupervisedProcess
from server.tracing import read_tracing
from server.triton_log import failure_reasons, model_process_failure, tail, without_gpu_complaints
from server.workspace import Workspace, create_workspace, readable

READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05

DEFAULT_ENVIRONMENT = Path(__file__).with_name("triton.env")

JOB_BOARDS = f"{JOB_BOARD_PREFIX}{{namespace}}_{{pid}}_*"
"""The folders in shared memory that the models `jobs` of a server make (`model_repository/jobs/1/job_folder.py`)."""

COULD_NOT_START = "could not start"


@dataclass(frozen=True)
class TritonAddress:
    """Where one of Triton's endpoints is.

    Attributes:
        host: An IPv4 address, or `unix:` and a path.
        port: Its port. A Unix socket of gRPC's has it in its name; one of HTTP's hasn't.
    """

    host: str
    port: int

    @property
    def url(self) -> str:
        """`HOST:PORT`, or `unix:PATH` as HTTP's sockets are named."""
        return self.host if self.host.startswith("unix:") else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class TritonOptions:
    """What a tritonserver is started with.

    Attributes:
        model_repository: Folder with one folder per model, absolute.
        http: Address of HTTP.
        grpc: Address of gRPC.
        metrics: Address of the Prometheus metrics.
        log_verbose: Triton's verbose logging level; 0 is off.
        ready_timeout_s: How long all models together may take to load, in seconds.
        stop_timeout_s: How long requests in flight may take to finish when it is stopped, in seconds.
        extra_arguments: More options for tritonserver.
    """

    model_repository: Path
    http: TritonAddress
    grpc: TritonAddress
    metrics: TritonAddress
    log_verbose: int
    ready_timeout_s: float
    stop_timeout_s: float
    extra_arguments: tuple[str, ...]


class Triton:
    """A tritonserver in processes of its own. Nothing is left behind, even where this process or it is killed.

    Args:
        options: What it is started with.
        installation: What it is made of.
        on_log: Called with whole lines of its log by `start` and `check`.

    Raises:
        ServerError: It can't be started.
    """

    def __init__(
        self, options: TritonOptions, installation: Installation, on_log: Callable[[str], None] | None = None
    ) -> None:
        self._options, self._on_log = options, on_log
        self._links: dict[Path, Path] = {}
        workspace = create_workspace(installation)
        try:
            self._process = self._spawn(workspace, installation)
        except BaseException:
            shutil.rmtree(workspace.root, ignore_errors=True)
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_until_ready(self, is_stop_requested: Callable[[], bool]) -> None:
        """Wait until all models are ready.

        Raises:
            ServerError: It can't start, isn't ready in time, or a stop was requested; `log_tail` has the log's end.
        """
        deadline = time.monotonic() + self._options.ready_timeout_s
        while not self._is_ready():
            self._check_alive(COULD_NOT_START)
            log = self.log_text()
            if failure := model_process_failure(log):
                raise ServerError(failure, tail(log))
            if is_stop_requested():
                raise ServerError("The server was stopped before it was ready.")
            if time.monotonic() >= deadline:
                raise ServerError(
                    f"The models were not ready in {self._options.ready_timeout_s:g} s: see the log, or allow more "
                    f"with --ready-timeout-s.",
                    tail(log),
                )
            time.sleep(POLL_S)
        self._check_alive(COULD_NOT_START)

    def check(self) -> None:
        """Hand on what it has logged.

        Raises:
            ServerError: It has ended by itself.
        """
        self._check_alive("died")

    def stop(self) -> None:
        """Let requests in flight finish, within the stop timeout, and end it."""
        self._process.stop()

    def kill(self) -> None:
        """End it at once; doesn't wait. May be called from a signal handler."""
        self._process.kill()

    def close(self) -> str:
        """Kill what still runs and clean up; return all that it had logged."""
        self._hand_on_log()
        log = self.log_text()
        self._process.close()
        return log

    def log_text(self) -> str:
        """All that it and its Python models have logged."""
        return readable(self._process.log_text(), self._links)

    def _spawn(self, workspace: Workspace, installation: Installation) -> SupervisedProcess:
        prefix = region_prefix()
        command = self._command(installation, workspace, prefix)
        self._links = workspace.links
        return SupervisedProcess(
            command,
            environment=_environment(installation, workspace),
            current_directory=workspace.current_directory,
            workspace=workspace.root,
            log=workspace.log,
            shared_memory_prefix=prefix,
            shared_memory_folders=JOB_BOARDS,
            stop_timeout_s=self._options.stop_timeout_s,
        )

    def _command(self, installation: Installation, workspace: Workspace, shared_memory_prefix: str) -> list[str]:
        options = self._options
        return [
            str(installation.tritonserver),
            f"--model-repository={workspace.plain(options.model_repository)}",
            f"--backend-directory={workspace.backends}",
            f"--cache-directory={workspace.plain(installation.cache_directory)}",
            f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
            f"--http-address={options.http.host}",
            f"--http-port={options.http.port}",
            f"--grpc-address={options.grpc.host}",
            f"--grpc-port={options.grpc.port}",
            f"--metrics-address={options.metrics.host}",
            f"--metrics-port={options.metrics.port}",
            f"--exit-timeout-secs={max(1, round(options.stop_timeout_s))}",
            f"--log-verbose={options.log_verbose}",
            # Configurations are complete; completing them would start every Python model twice.
            "--disable-auto-complete-config",
            *(tracing.triton_arguments if (tracing := read_tracing()) else ()),
            *options.extra_arguments,
        ]

    def _is_ready(self) -> bool:
        """Whether all models are ready, and the metrics, which tritonserver starts last."""
        metrics_wanted = not any("allow-metrics" in argument for argument in self._options.extra_arguments)
        return answers(self._options.http.url, "/v2/health/ready") and (
            not metrics_wanted or answers(self._options.metrics.url, "/metrics")
        )

    def _check_alive(self, what_happened: str) -> None:
        self._hand_on_log()
        status = self._process.exit_status()
        if status is not None:
            log = self.log_text()
            raise ServerError(_death_sentence(log, status, what_happened), tail(log))

    def _hand_on_log(self) -> None:
        if self._on_log is not None and (lines := without_gpu_complaints(self._process.new_log_lines())):
            self._on_log(readable(lines, self._links))


def _environment(installation: Installation, workspace: Workspace) -> dict[str, str]:
    """This process's environment, with the two search paths that tritonserver and its stubs need."""
    lines = DEFAULT_ENVIRONMENT.read_text(encoding="utf-8").splitlines()
    defaults = dict(line.split("=", 1) for line in lines if line[:1] not in ("", "#"))
    environment = {**defaults, **workspace.home(), **os.environ}
    if tracing := read_tracing():
        environment |= tracing.triton_environment
    for name, directories in (
        ("PATH", [workspace.command_directory]),
        ("LD_LIBRARY_PATH", [workspace.plain(directory) for directory in installation.library_directories]),
    ):
        inherited = [environment[name]] if environment.get(name) else []
        environment[name] = os.pathsep.join([*(str(directory) for directory in directories), *inherited])
    return environment


def _death_sentence(log: str, status: int, what_happened: str) -> str:
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    reasons = failure_reasons(log) if what_happened == COULD_NOT_START else []
    return " ".join(reasons) or f"tritonserver {what_happened} ({how}): see its log."
