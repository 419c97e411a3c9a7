"""Direct calls of the model `unet` over gRPC, and its metrics."""

import queue
import urllib.request
from typing import Any

import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from server import EmbeddedServer
from tests.helpers.tiny_unet import make_request, unet_inputs

TIMEOUT_S = 60.0


def metric(server: EmbeddedServer, name: str, **labels: str) -> float:
    """Return the value of a metric of the model `unet`, 0 if there is none with these labels."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=TIMEOUT_S) as response:
        text = response.read().decode()
    for line in text.splitlines():
        if line.startswith(f"audioldm2_unet_{name}{{") and all(
            f'{key}="{value}"' in line for key, value in labels.items()
        ):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


class UnetCaller:
    """Calls the model `unet` over gRPC without waiting, and collects answers in the order of their arrival."""

    def __init__(self, client: tritonclient.grpc.InferenceServerClient) -> None:
        self._client = client
        self.answers: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()

    def call(self, timeout_us: int | None = None, **request: Any) -> Any:
        return self._client.async_infer(
            "unet",
            unet_inputs(make_request(**request)),
            lambda result, error: self.answers.put((result, error)),
            timeout=timeout_us,
        )

    def next_answer(self) -> tuple[Any, InferenceServerException | None]:
        return self.answers.get(timeout=TIMEOUT_S)
