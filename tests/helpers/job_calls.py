"""Generations with an id, and what the model `jobs` says of them, with nothing but HTTP and JSON."""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server import EmbeddedServer
from tests.helpers.triton_configs import INPUT_TYPES

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What came back: HTTP's status, the JSON, and when that was on the monotonic clock."""

    status: int
    body: dict[str, Any]
    arrived_s: float

    @property
    def error(self) -> str:
        """The server's sentence; empty if there was no error."""
        return str(self.body.get("error", ""))


def post(server: EmbeddedServer, path: str, body: bytes) -> Answer:
    """Send JSON to one of the server's models."""
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{path}", data=body)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read()
    return Answer(status, json.loads(content), time.monotonic())


def generate(server: EmbeddedServer, request_id: str, model: str = "audioldm2", **inputs: Any) -> Answer:
    """Call an ensemble with an id; `timeout_us` may be among the inputs, which are single values."""
    parameters = {"timeout": inputs.pop("timeout_us")} if "timeout_us" in inputs else {}
    tensors = [
        {"name": name, "shape": [1], "datatype": INPUT_TYPES[name][0], "data": [value]}
        for name, value in ({"prompt": "a dog", "seed": 7} | inputs).items()
    ]
    body = {"id": request_id, "inputs": tensors, "parameters": parameters}
    return post(server, f"{model}/infer", json.dumps(body).encode())


def is_ready(server: EmbeddedServer) -> bool:
    """Whether the server says that it is ready."""
    try:
        with urllib.request.urlopen(f"http://{server.http_url}/v2/health/ready", timeout=TIMEOUT_S) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False


def ask(server: EmbeddedServer, request_id: str, action: str | None = None, model: str = "jobs") -> dict[str, Any]:
    """Return what the model `jobs` says of a request."""
    body = {"request_id": request_id} | ({} if action is None else {"action": action})
    answer = post(server, f"{model}/generate", json.dumps(body).encode())
    assert answer.status == 200, answer
    return {name: answer.body[name] for name in ("state", "step", "total_steps", "requests_ahead")}


def wait_for(server: EmbeddedServer, request_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask again and again until what is said of a request fulfils a condition."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition(said := ask(server, request_id)):
        assert time.monotonic() < deadline, said
        time.sleep(0.005)
    return said


def wait_for_state(server: EmbeddedServer, request_id: str, state: str) -> dict[str, Any]:
    """Ask until a request is in a state; a request that is over instead fails the test."""
    said = wait_for(server, request_id, lambda said: said["state"] in (state, "done", "failed", "cancelled"))
    assert said["state"] == state, said
    return said


def rows_are_free(server: EmbeddedServer) -> bool:
    """Whether no request is being denoised and none waits for it, by the metrics."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=TIMEOUT_S) as response:
        text = response.read().decode()
    values = re.findall(r"^audioldm2_unet_requests_(?:in_flight|waiting)\{.*\} (\S+)", text, re.MULTILINE)
    assert len(values) == 2
    return [float(value) for value in values] == [0, 0]


def wait_until_rows_are_free(server: EmbeddedServer) -> None:
    """Ask again and again; fails after a while."""
    deadline = time.monotonic() + TIMEOUT_S
    while not rows_are_free(server):
        assert time.monotonic() < deadline, "rows are in use"
        time.sleep(0.005)
