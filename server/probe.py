"""The command `python -m server.probe`: whether a Triton lives, with all of its stages; for containers' probes.

Triton's own health says too little: up to 2.51 a model stays ready when its process is dead, and in later versions an
ensemble does. It needs the standard library and `server/stubs.py` alone, and runs where tritonserver's processes can
be seen, in the same container.
"""

import argparse
import contextlib
import http.client
import json
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.stubs import (
    STOPPED_STATES,
    Stub,
    Thread,
    find_servers,
    find_stubs,
    switches_of_all_threads,
)

TIMEOUT_S = 5.0
SILENCE_S = 2.0
"""A stage whose threads have all not run for so long stands still; its heartbeat comes every 0.3 s."""
POLL_S = 0.05

_LISTEN = "0A"  # the state of a socket in /proc/net/tcp


class ProbeError(Exception):
    """Something is wrong; `str(error)` is a sentence that says what."""


@dataclass(frozen=True)
class _Model:
    name: str
    is_python: bool
    is_ensemble: bool


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Triton:
    """The HTTP endpoint of a Triton, and how much time there is for all questions to it."""

    def __init__(self, address: str, deadline: float) -> None:
        self.address, self._deadline = address, deadline

    def is_ok(self, path: str) -> bool:
        """Say whether a GET is answered with 200."""
        return self._ask("GET", path)[0] == http.HTTPStatus.OK

    def json(self, method: str, path: str) -> Any:
        """Return what is answered."""
        status, body = self._ask(method, path)
        if status != http.HTTPStatus.OK:
            raise ProbeError(f"tritonserver answers {path} with status {status}: {body[:200].decode(errors='replace')}")
        try:
            return json.loads(body)
        except ValueError as error:
            raise ProbeError(f"tritonserver answers {path} with something else than JSON") from error

    def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        connection = self._connection()
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except TimeoutError as error:
            raise ProbeError(f"tritonserver at {self.address} did not answer {path} in time") from error
        except (OSError, OverflowError, http.client.HTTPException) as error:
            raise ProbeError(f"tritonserver at {self.address} does not answer {path} ({error})") from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        timeout = max(0.01, self._deadline - time.monotonic())
        if self.address.startswith("unix:"):
            return _UnixConnection(self.address.removeprefix("unix:"), timeout)
        try:
            return http.client.HTTPConnection(self.address, timeout=timeout)
        except http.client.InvalidURL as error:
            raise ProbeError(f"{self.address} is no address, give HOST:PORT or unix:PATH ({error})") from error


def probe(address: str, *, ready: bool, timeout_s: float) -> str:
    """Check that tritonserver answers, that its models are ready, and that the processes of its stages run.

    Args:
        address: Of its HTTP endpoint: `HOST:PORT` or `unix:PATH`.
        ready: Ask as well whether it takes requests (`/v2/health/ready`).
        timeout_s: For everything together.

    Returns:
        A sentence about what was found.

    Raises:
        ProbeError: Something is wrong.
    """
    deadline = time.monotonic() + timeout_s
    triton = _Triton(address, deadline)
    for path in ("/v2/health/live", *(["/v2/health/ready"] if ready else [])):
        if not triton.is_ok(path):
            raise ProbeError(f"tritonserver says that it is not {path.rpartition('/')[2]}")
    models = _ready_models(triton)
    stubs = _stubs(address)
    _check_dead(models, stubs)
    _check_stalled(stubs, min(deadline, time.monotonic() + SILENCE_S))
    return f"{len(models)} models are ready, and {len(stubs)} processes of stages run"


def _ready_models(triton: _Triton) -> list[_Model]:
    index = triton.json("POST", "/v2/repository/index")
    loaded = [entry for entry in index if entry.get("state")]  # without one it was never asked for
    for entry in loaded:
        name = entry["name"]
        if entry["state"] != "READY" or not triton.is_ok(f"/v2/models/{name}/ready"):
            reason = entry.get("reason") or f"its state is {entry['state']}"
            raise ProbeError(f"model {name} is not ready ({reason})")
    return [_model(entry["name"], triton.json("GET", f"/v2/models/{entry['name']}/config")) for entry in loaded]


def _model(name: str, config: dict[str, Any]) -> _Model:
    return _Model(name, config.get("backend") == "python", "ensemble_scheduling" in config)


def _stubs(address: str) -> list[Stub]:
    servers = find_servers()
    if len(servers) > 1:
        sockets = _listening_sockets(address)
        servers = [server for server in servers if sockets & _sockets_of(server)]
    if not servers:
        raise ProbeError(
            f"no process tritonserver that listens on {address} can be seen from here: run the probe in its "
            f"container, as its user"
        )
    return [stub for server in servers for stub in find_stubs(server)]


def _listening_sockets(address: str) -> set[str]:
    """Return the kernel's numbers of the sockets that listen on an address; on a port, at whatever host."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        rows = [line.split() for line in _lines("/proc/net/unix")]
        return {row[6] for row in rows if row[7:] == [path]}
    port = f":{int(address.rpartition(':')[2]):04X}"
    rows = [line.split() for table in ("tcp", "tcp6") for line in _lines(f"/proc/net/{table}")]
    return {row[9] for row in rows if row[1].endswith(port) and row[3] == _LISTEN}


def _lines(table: str) -> list[str]:
    try:
        return Path(table).read_text().splitlines()[1:]
    except OSError:
        return []


def _sockets_of(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    return found


def _check_dead(models: Iterable[_Model], stubs: Sequence[Stub]) -> None:
    alive = {stub.model for stub in stubs}
    dead = [model.name for model in models if model.is_python and model.name not in alive]
    if "" in alive:  # a zombie, which has no model's name any more; models of Python-based backends have stubs as well
        dead = dead or [model.name for model in models if not model.is_ensemble and model.name not in alive]
    if dead or "" in alive:
        raise ProbeError(f"stage {' or '.join(dead)} died" if dead else "a stage died")


def _check_stalled(stubs: Sequence[Stub], deadline: float) -> None:
    """Wait until each stub has run, which takes 0.3 s in all."""
    before = {stub: switches_of_all_threads(stub.pid) for stub in stubs}
    waiting = [stub for stub in stubs if before[stub] is not None]
    while waiting := [stub for stub in waiting if switches_of_all_threads(stub.pid) == before[stub]]:
        if time.monotonic() >= deadline:
            why = "stopped" if _is_stopped(waiting[0]) else "stalled"
            raise ProbeError(f"stage {' and '.join(stub.model for stub in waiting)} has not run for a while ({why})")
        time.sleep(POLL_S)


def _is_stopped(stub: Stub) -> bool:
    with contextlib.suppress(OSError), Thread(stub.pid, stub.pid) as thread:
        return thread.look().state in STOPPED_STATES
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a sentence, and return 0 where everything is well, otherwise 1."""
    parser = argparse.ArgumentParser(
        prog="python -m server.probe",
        description="Check that a Triton on this machine lives, with the processes of all of its stages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--http", default="127.0.0.1:8000", metavar="ADDRESS", help="its HTTP endpoint, HOST:PORT or unix:PATH")
    add("--ready", action="store_true", help="check as well that it takes requests")
    add("--timeout-s", type=float, default=TIMEOUT_S, metavar="S", help="time for everything together")
    options = parser.parse_args(arguments)
    try:
        print(f"ok: {probe(options.http, ready=options.ready, timeout_s=options.timeout_s)}")
    except ProbeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
