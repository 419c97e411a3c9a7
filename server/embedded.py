"""The embedded server: Triton, the front before it, and a keeper that starts again what has died."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from server.checks import Listener, check_model_repository, check_platform, choose_ports, is_loopback, resolve_host
from server.errors import ServerError
from server.front.metrics import FRONT, TRITONSERVER
from server.front.process import FrontFolder, FrontOptions, FrontProcess
from server.installation import Installation, find_installation
from server.public_models import find_public_models
from server.request_log import RequestLog, is_refusal, read_format, request_line
from server.triton import READY_TIMEOUT_S, STOP_TIMEOUT_S, Triton, TritonAddress, TritonOptions
from server.triton_log import tail
from server.watchdog import CHECK_INTERVAL_S, MAX_RESTARTS, RestartPolicy, Watchdog

CUT_TIMEOUT_S = 3.0
"""How long requests that are cut at the end may take to be answered."""

END_TIMEOUT_S = 0.5

RESTARTING = "the server is started again: try again in some seconds."

# A free port that was picked here may be taken by another process before the server listens on it.
START_ATTEMPTS = 3
PORT_TAKEN = "already in use"


class EmbeddedServer:
    """Triton Inference Server over one model repository, behind a front, in processes of their own.

    Use it as a context manager, or call `start` and, whatever happens, `stop`. Nothing is left behind by either: no
    process, no temporary folder, no shared memory, even where this process or any of its children is killed. What dies
    is started again.

    Args:
        model_repository: Folder with one folder per model.
        host: IPv4 address or name for HTTP and gRPC. There is no authentication: keep it on loopback.
        http_port: 0 picks a free port, as for the other two.
        grpc_port: Port of the gRPC endpoint.
        metrics_port: Port of the Prometheus metrics.
        metrics_host: IPv4 address or name for the metrics, apart from `host` so that they stay private.
        log_verbose: Triton's verbose logging level; 0 is off.
        ready_timeout_s: How long all models together may take to load, in seconds.
        stop_timeout_s: How long requests in flight may take to finish when the server is stopped, in seconds.
        extra_arguments: More options for tritonserver, such as `("--cache-config", "local,size=1048576")`. It runs in
            an empty folder, so paths among them must be absolute.
        on_log: Called with whole lines of tritonserver's log, by a thread of the server's own.
        on_request: Called with a line for each request that is over or refused (docs/observability.md), by threads of
            the server's own. It mustn't wait for anything.
        on_event: Called by that thread with a sentence when something has died, and when it is back.
        front: Whether the front is there. Without it Triton itself listens on the ports: anybody who reaches them can
            end it, call its stages and register shared memory.
        expose_internals: Whether the front lets through what isn't public, too; on loopback alone.
        max_restarts: How often in a row what has died is started again; after that the server ends.
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
        on_request: Callable[[str], None] | None = None,
        on_event: Callable[[str], None] | None = None,
        front: bool = True,
        expose_internals: bool = False,
        max_restarts: int = MAX_RESTARTS,
    ) -> None:
        self._model_repository = Path(model_repository).absolute()
        self._host, self._metrics_host = host, metrics_host
        self._ports = (http_port, grpc_port, metrics_port)
        self._log_verbose = log_verbose
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._extra_arguments = tuple(extra_arguments)
        self._on_log, self._on_event = on_log, on_event
        self._request_log = RequestLog(on_request, read_format()) if on_request is not None else None
        self._has_front, self._exposes_internals = front, expose_internals
        self._listeners: tuple[Listener, ...] = ()
        self._folder: FrontFolder | None = None
        self._front: FrontProcess | None = None
        self._triton: Triton | None = None
        self._watchdog: Watchdog | None = None
        self._restarts = RestartPolicy(max_restarts)
        self._num_restarts: Counter[str] = Counter({TRITONSERVER: 0, FRONT: 0})
        self._keeper: threading.Thread | None = None
        self._failure: ServerError | None = None
        self._ending = threading.Event()
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
        """Tritonserver's process id; another one after a restart.

        Raises:
            ServerError: The server isn't running.
        """
        if self._triton is None:
            raise _not_running()
        return self._triton.pid

    @property
    def stages(self) -> dict[str, int]:
        """Process id of each stage that has a process of its own, by the model's name; empty during a restart."""
        return self._watchdog.stages if self._watchdog is not None else {}

    @property
    def stop_requested(self) -> bool:
        """Whether `request_stop` was called."""
        return self._stop_requests > 0

    def start(self) -> Self:
        """Check everything, start tritonserver and the front, and wait until all models are ready.

        Raises:
            ServerError: It can't start, or isn't ready in time; its `log_tail` has the end of Triton's log.
        """
        if self._triton is not None:
            raise ServerError("This server is already running: stop it first.")
        check_platform()
        installation = find_installation()
        check_model_repository(self._model_repository)
        self._check_exposure()
        self._ending.clear()
        self._failure = None
        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                self._start_once(installation)
                break
            except ServerError as error:
                if not (attempts_left and 0 in self._ports and PORT_TAKEN in f"{error}{error.log_tail}".lower()):
                    raise
        self._keeper = threading.Thread(target=self._keep, args=[installation], name="server-keeper", daemon=True)
        self._keeper.start()
        return self

    def wait(self) -> None:
        """Block until `request_stop` is called.

        Raises:
            ServerError: The server has died, and was started again too often already, or couldn't be.
        """
        if self._keeper is None:
            raise _not_running()
        while not self.stop_requested:
            if self._failure is not None:
                raise self._failure
            time.sleep(CHECK_INTERVAL_S)

    def stop(self) -> int:
        """End the server; nothing if it isn't running.

        Requests in flight may finish within the stop timeout, while new ones are refused. Then the rest is answered
        with UNAVAILABLE.

        Returns:
            How many requests were answered so, and not finished.
        """
        self._ending.set()
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        try:
            return self._drain()
        finally:
            self._close()

    def request_stop(self) -> None:
        """Make `start` and `wait` return soon; called again, kill the server. May be called from a signal handler."""
        self._stop_requests += 1
        if self._stop_requests > 1 and self._triton is not None:
            self._triton.kill()

    def log_text(self) -> str:
        """All that tritonserver and its Python models have logged; after the end, all that they had."""
        return self._triton.log_text() if self._triton is not None else self._final_log

    def _check_exposure(self) -> None:
        if self._exposes_internals and not is_loopback(resolve_host(self._host, "--host")):
            raise ServerError(
                f"--expose-internals lets callers reach what can end the server, on loopback alone, and --host is "
                f"{self._host}: leave one of them out."
            )

    def _start_once(self, installation: Installation) -> None:
        self._listeners = self._choose_listeners()
        try:
            if self._has_front:
                self._folder = FrontFolder()
                self._front = self._start_front()
                self._front.set_unavailable("the models are being loaded: try again in some seconds.")
            self._start_triton(installation)
            if self._front is not None:
                self._front.set_unavailable("")
        except BaseException:
            self._close()
            raise

    def _start_front(self) -> FrontProcess:
        assert self._folder is not None  # noqa: S101 - for the type checker
        public = find_public_models(self._model_repository)
        http, grpc, metrics = self._listeners
        options = FrontOptions(
            http=f"{http.address}:{http.port}",
            grpc=f"{grpc.address}:{grpc.port}",
            metrics=f"{metrics.address}:{metrics.port}",
            models=public.names,
            jobs_models=public.jobs,
            exposes_internals=self._exposes_internals,
        )
        triton = self._triton_addresses()
        grpc_url = f"{triton[1].host}:{triton[1].port}"
        front = FrontProcess(options, self._folder, triton[0].url, grpc_url, triton[2].url, self._take_front_log)
        front.set_restarts(self._num_restarts)
        return front

    def _start_triton(self, installation: Installation) -> None:
        http, grpc, metrics = self._triton_addresses()
        if self._folder is not None:
            self._folder.remove_sockets("triton")
        options = TritonOptions(
            model_repository=self._model_repository,
            http=http,
            grpc=grpc,
            metrics=metrics,
            log_verbose=self._log_verbose,
            ready_timeout_s=self._ready_timeout_s,
            stop_timeout_s=self._stop_timeout_s,
            extra_arguments=self._extra_arguments,
        )
        self._triton = Triton(options, installation, self._take_log)
        self._triton.wait_until_ready(lambda: self.stop_requested or self._ending.is_set())
        self._watchdog = Watchdog(self._triton.pid)
        self._restarts.ready()
        self._tell_processes()

    def _tell_processes(self) -> None:
        """Tell the front whose memory its metrics have."""
        if self._front is not None and self._triton is not None and self._watchdog is not None:
            stages = self._watchdog.stages
            self._front.set_processes({TRITONSERVER: self._triton.pid, **stages})
            # A counter that isn't there before its first event hides that from Prometheus.
            self._num_restarts.update(dict.fromkeys(stages, 0))
            self._front.set_restarts(self._num_restarts)

    def _take_log(self, lines: str) -> None:
        """Take whole lines of Triton's log."""
        if self._on_log is not None:
            self._on_log(lines)
        if self._request_log is not None:
            for line in filter(None, map(request_line, lines.splitlines())):
                self._request_log.add(line, is_refusal=is_refusal(line))

    def _take_front_log(self, line: str) -> None:
        """Take a line of the front's log, which it has bounded itself."""
        if self._request_log is not None:
            self._request_log.add(line, is_refusal=False)

    def _triton_addresses(self) -> tuple[TritonAddress, ...]:
        """Where Triton listens: on sockets that only this user reaches, or, without a front, on the public ports."""
        if self._folder is None:
            return tuple(TritonAddress(listener.address, listener.port) for listener in self._listeners)
        return tuple(TritonAddress(self._folder.socket(f"triton_{name}"), 1) for name in ("http", "grpc", "metrics"))

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

    def _keep(self, installation: Installation) -> None:
        """Look after the server until it is stopped, or can't be kept."""
        try:
            while not self._ending.wait(CHECK_INTERVAL_S):
                if self._request_log is not None:
                    self._request_log.flush()
                if fault := self._find_fault_of_triton():
                    self._restart_triton(fault, installation)
                elif self._front is not None and not self._front.is_alive():
                    self._restart_front(self._front)
        except ServerError as error:
            if not self._ending.is_set():
                self._failure = error
        except Exception as error:  # of a callback: nobody looks after the server any more
            self._failure = ServerError(f"The server isn't looked after any more: {error!r}.")
            raise

    def _find_fault_of_triton(self) -> str:
        """Return what is wrong; an empty text if nothing is."""
        if end := self._end_of_triton(timeout_s=0.0):
            return end
        if self._front is not None and (words := self._front.fault()):
            return words
        fault = self._watchdog.check() if self._watchdog is not None else None
        if fault and not fault.stage:  # its supervisor tells how it ended, a moment later
            return self._end_of_triton(END_TIMEOUT_S) or str(fault)
        return str(fault) if fault else ""

    def _end_of_triton(self, timeout_s: float) -> str:
        """Return how tritonserver has ended; empty where it hasn't within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._triton is not None:
            try:
                self._triton.check()
            except ServerError as error:
                return str(error)
            if time.monotonic() >= deadline:
                break
            time.sleep(CHECK_INTERVAL_S / 10)
        return ""

    def _restart_triton(self, fault: str, installation: Installation) -> None:
        """End what is left of Triton, whose callers are told, and start it again.

        Raises:
            ServerError: It has died too often, or can't be started.
        """
        if self._front is not None:
            self._front.set_unavailable(f"{fault.rstrip('.')}; {RESTARTING}")
        self._close_triton()
        self._report(f"{fault.rstrip('.')}.")
        self._count_restart(fault.split()[1] if fault.startswith("stage ") else TRITONSERVER)
        if self._ending.wait(self._delay_s(fault)):
            return
        self._start_triton(installation)
        if self._front is not None:
            self._front.set_unavailable("")
        self._report("The server is ready again.")

    def _restart_front(self, front: FrontProcess) -> None:
        fault = "the front has died"
        self._report(f"{fault.capitalize()}.")
        if not self._ending.wait(self._delay_s(fault)):
            front.close()
            self._count_restart(FRONT)
            self._front = self._start_front()
            self._tell_processes()
            self._restarts.ready()

    def _delay_s(self, fault: str) -> float:
        """Return how long to wait before the next start.

        Raises:
            ServerError: There is none; its `log_tail` has the end of Triton's log.
        """
        try:
            return self._restarts.delay_s(fault)
        except ServerError as error:
            raise ServerError(str(error), tail(self.log_text())) from None

    def _count_restart(self, process: str) -> None:
        self._num_restarts[process] += 1
        if self._front is not None:
            self._front.set_restarts(self._num_restarts)

    def _report(self, sentence: str) -> None:
        if self._on_event is not None:
            self._on_event(sentence)

    def _drain(self) -> int:
        """Wait for the requests in flight, and cut the rest; return how many that were."""
        num_cut = 0
        if self._front is not None:
            if self._front.is_alive() and self._stop_requests < 2 and not self._front.stop(self._stop_timeout_s):
                num_cut = self._cut(self._front)
            self._front.close()  # before Triton, which waits until its connections are closed
        if self._triton is not None:
            self._triton.stop()
        return num_cut

    def _cut(self, front: FrontProcess) -> int:
        """Have all requests answered that are with Triton: by a stage that sees the cancellation, or by its end."""
        num_cut = front.cut()
        if not front.wait_until_idle(CUT_TIMEOUT_S) and self._triton is not None:
            self._triton.kill()
            front.wait_until_idle(CUT_TIMEOUT_S)
        return num_cut

    def _close(self) -> None:
        """Kill what still runs, and let the supervisor clean up."""
        with ExitStack() as stack:
            if self._folder is not None:
                stack.callback(self._folder.remove)
            if self._front is not None:
                stack.callback(self._front.close)
            if self._triton is not None:
                self._close_triton()
            self._front = self._folder = None
            if self._request_log is not None:
                stack.callback(self._request_log.flush, at_end=True)

    def _close_triton(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        if self._triton is not None:
            triton, self._triton = self._triton, None
            self._final_log = triton.close()

    def _url(self, index: int) -> str:
        if not self._listeners:
            raise _not_running()
        listener = self._listeners[index]
        address = "127.0.0.1" if listener.address == "0.0.0.0" else listener.address  # noqa: S104 - compared, not bound
        return f"{address}:{listener.port}"


def _not_running() -> ServerError:
    return ServerError("The server isn't running: start it first.")
