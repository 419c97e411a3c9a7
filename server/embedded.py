"""One tritonserver from its start to its end, as a context manager."""

import http.client
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from server.checks import Listener, check_model_repository, check_platform, choose_ports, resolve_host
from server.errors import ServerError
from server.installation import Installation, find_installation
from server.leftovers import region_prefix
from server.process import SupervisedProcess
from server.triton_log import failure_reasons, model_process_failure, tail, without_gpu_complaints
from server.workspace import Workspace, create_workspace, readable

READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05
PROBE_TIMEOUT_S = 2.0

DEFAULT_ENVIRONMENT = Path(__file__).with_name("triton.env")

JOB_BOARDS = "audioldm2_jobs_{namespace}_{pid}_*"
"""The folders in shared memory that the models `jobs` of a server make (`model_repository/jobs/1/job_folder.py`)."""

COULD_NOT_START = "could not start"

# A free port that was picked here may be taken by another process before tritonserver listens on it.
START_ATTEMPTS = 3
PORT_TAKEN = "already in use"


class EmbeddedServer:
    """Triton Inference Server over one model repository, in processes of its own.

    Use it as a context manager, or call `start` and, whatever happens, `stop`. Nothing is left behind by either: no
    process, no temporary folder, no shared memory, even where this process or tritonserver is killed.

    Args:
        model_repository: Folder with one folder per model.
        host: IPv4 address or name for HTTP and gRPC. Triton has no authentication: keep it on loopback.
        http_port: 0 picks a free port, as for the other two.
        grpc_port: Port of the gRPC endpoint.
        metrics_port: Port of the Prometheus metrics.
        metrics_host: IPv4 address or name for the metrics, apart from `host` so that they stay private.
        log_verbose: Triton's verbose logging level; 0 is off.
        ready_timeout_s: How long all models together may take to load, in seconds.
        stop_timeout_s: How long requests in flight may take to finish when the server is stopped, in seconds.
        extra_arguments: More options for tritonserver, such as `("--cache-config", "local,size=1048576")`. It runs in
            an empty folder, so paths among them must be absolute.
        on_log: Called with whole lines of tritonserver's log while `start` and `wait` run.
    """

    def __init__(
        self,
        model_repository: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        metrics_host: str = "127.0.0.1",
        log_verbose: int = 0,
        ready_timeout_s: float = READY_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
        extra_arguments: Sequence[str] = (),
        on_log: Callable[[str], None] | None = None,
    ) -> None:
        self._model_repository = Path(model_repository).absolute()
        self._host, self._metrics_host = host, metrics_host
        self._ports = (http_port, grpc_port, metrics_port)
        self._log_verbose = log_verbose
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._extra_arguments = tuple(extra_arguments)
        self._on_log = on_log
        self._process: SupervisedProcess | None = None
        self._links: dict[Path, Path] = {}
        self._listeners: tuple[Listener, ...] = ()
        self._final_log = ""
        self._stop_requests = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        """`HOST:PORT` of the HTTP endpoint, as tritonclient takes it."""
        return self._url(0)

    @property
    def grpc_url(self) -> str:
        """`HOST:PORT` of the gRPC endpoint, as tritonclient takes it."""
        return self._url(1)

    @property
    def metrics_url(self) -> str:
        """`HOST:PORT` of the Prometheus metrics, which are at `/metrics`."""
        return self._url(2)

    @property
    def pid(self) -> int:
        """Tritonserver's process id.

        Raises:
            ServerError: The server isn't running.
        """
        return self._running().pid

    @property
    def stop_requested(self) -> bool:
        """Whether `request_stop` was called."""
        return self._stop_requests > 0

    def start(self) -> Self:
        """Check everything, start tritonserver and wait until all models are ready.

        Raises:
            ServerError: It can't start, or isn't ready in time; its `log_tail` has the end of Triton's log.
        """
        if self._process is not None:
            raise ServerError("This server is already running: stop it first.")
        check_platform()
        installation = find_installation()
        check_model_repository(self._model_repository)
        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                self._start_once(installation)
                break
            except ServerError as error:
                if not (attempts_left and 0 in self._ports and PORT_TAKEN in str(error)):
                    raise
        return self

    def wait(self) -> None:
        """Block until `request_stop` is called.

        Raises:
            ServerError: tritonserver ended by itself.
        """
        process = self._running()
        while not self.stop_requested:
            self._check_alive(process, "died")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Let requests in flight finish, within the stop timeout, and end the server; nothing if it isn't running."""
        if self._process is not None:
            self._process.stop()
            self._abandon()

    def request_stop(self) -> None:
        """Make `start` and `wait` return soon; called again, kill the server. May be called from a signal handler."""
        self._stop_requests += 1
        if self._stop_requests > 1 and self._process is not None:
            self._process.kill()

    def log_text(self) -> str:
        """All that tritonserver and its Python models have logged; after the end, all that they had."""
        return self._log_of(self._process) if self._process is not None else self._final_log

    def _start_once(self, installation: Installation) -> None:
        self._listeners = self._choose_listeners()
        try:
            self._process = self._spawn(installation)
            self._wait_until_ready(self._process)
        except BaseException:
            self._abandon()
            raise

    def _choose_listeners(self) -> tuple[Listener, ...]:
        host = resolve_host(self._host, "--host")
        metrics_host = resolve_host(self._metrics_host, "--metrics-host")
        wanted = [
            Listener(option, address, port)
            for option, address, port in zip(
                ("--http-port", "--grpc-port", "--metrics-port"), (host, host, metrics_host), self._ports, strict=True
            )
        ]
        ports = choose_ports(wanted)
        return tuple(Listener(w.option, w.address, port) for w, port in zip(wanted, ports, strict=True))

    def _spawn(self, installation: Installation) -> SupervisedProcess:
        workspace = create_workspace(installation)
        try:
            return self._spawn_in(workspace, installation)
        except BaseException:
            shutil.rmtree(workspace.root, ignore_errors=True)
            raise

    def _spawn_in(self, workspace: Workspace, installation: Installation) -> SupervisedProcess:
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
            stop_timeout_s=self._stop_timeout_s,
        )

    def _command(self, installation: Installation, workspace: Workspace, shared_memory_prefix: str) -> list[str]:
        http, grpc, metrics = self._listeners
        return [
            str(installation.tritonserver),
            f"--model-repository={workspace.plain(self._model_repository)}",
            f"--backend-directory={workspace.backends}",
            f"--cache-directory={workspace.plain(installation.cache_directory)}",
            f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
            f"--http-address={http.address}",
            f"--http-port={http.port}",
            f"--grpc-address={grpc.address}",
            f"--grpc-port={grpc.port}",
            f"--metrics-address={metrics.address}",
            f"--metrics-port={metrics.port}",
            f"--exit-timeout-secs={max(1, round(self._stop_timeout_s))}",
            f"--log-verbose={self._log_verbose}",
            # Configurations are complete; completing them would start every Python model twice.
            "--disable-auto-complete-config",
            *self._extra_arguments,
        ]

    def _wait_until_ready(self, process: SupervisedProcess) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._is_ready():
            self._check_alive(process, COULD_NOT_START)
            log = self._log_of(process)
            if failure := model_process_failure(log):
                raise ServerError(failure, tail(log))
            if self.stop_requested:
                raise ServerError("The server was stopped before it was ready.")
            if time.monotonic() >= deadline:
                raise ServerError(
                    f"The models were not ready in {self._ready_timeout_s:g} s: see the log, or allow more with "
                    f"--ready-timeout-s.",
                    tail(log),
                )
            time.sleep(POLL_S)
        self._check_alive(process, COULD_NOT_START)

    def _is_ready(self) -> bool:
        """Whether all models are ready, and the metrics, which tritonserver starts last."""
        metrics_wanted = not any("allow-metrics" in argument for argument in self._extra_arguments)
        return _answers(self.http_url, "/v2/health/ready") and (
            not metrics_wanted or _answers(self.metrics_url, "/metrics")
        )

    def _check_alive(self, process: SupervisedProcess, what_happened: str) -> None:
        if self._on_log is not None and (lines := without_gpu_complaints(process.new_log_lines())):
            self._on_log(readable(lines, self._links))
        status = process.exit_status()
        if status is not None:
            log = self._log_of(process)
            raise ServerError(_death_sentence(log, status, what_happened), tail(log))

    def _abandon(self) -> None:
        """Kill what still runs and let the supervisor clean up."""
        if self._process is not None:
            process, self._process = self._process, None
            self._final_log = self._log_of(process)
            process.close()

    def _log_of(self, process: SupervisedProcess) -> str:
        return readable(process.log_text(), self._links)

    def _running(self) -> SupervisedProcess:
        if self._process is None:
            raise ServerError("The server isn't running: start it first.")
        return self._process

    def _url(self, index: int) -> str:
        if not self._listeners:
            raise ServerError("The server isn't running: start it first.")
        listener = self._listeners[index]
        address = "127.0.0.1" if listener.address == "0.0.0.0" else listener.address  # noqa: S104 - compared, not bound
        return f"{address}:{listener.port}"


def _answers(url: str, path: str) -> bool:
    """Whether an HTTP GET is answered with 200."""
    host, port = url.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _environment(installation: Installation, workspace: Workspace) -> dict[str, str]:
    """This process's environment, with the two search paths that tritonserver and its stubs need."""
    lines = DEFAULT_ENVIRONMENT.read_text(encoding="utf-8").splitlines()
    defaults = dict(line.split("=", 1) for line in lines if line[:1] not in ("", "#"))
    environment = {**defaults, **workspace.home(), **os.environ}
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
