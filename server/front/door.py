"""The door: Envoy's external processor. It decides what reaches Triton, and ends what nobody waits for any more.

https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/ext_proc_filter
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
import grpc.aio
from envoy.service.ext_proc.v3 import external_processor_pb2
from tritonclient.grpc import service_pb2, service_pb2_grpc

from server.front.exchange import Exchange
from server.front.full_models import FullModels
from server.front.inference import DROPPED
from server.front.metrics import DoorMetrics
from server.front.refusals import UNAVAILABLE, RefusedError
from server.front.targets import Access
from server.request_log import RequestLog
from server.watchdog import fault_in_answer

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
SHOWN_CHARACTERS = 128
SHOWN_ERROR_CHARACTERS = 200
CANCEL_TIMEOUT_S = 30.0
STOPPING = "the server stops."
LOST = "the server is started again: try again in some seconds."
PAUSE_S = 0.8
"""So long without a turn, and the whole machine may have stood still: Triton's stages with it (server/watchdog.py)."""
QUARANTINE_S = 0.5
"""So long answers wait then, until the watchdog has looked."""


class Door:
    """Answers Envoy, and knows which requests are with Triton.

    Args:
        access: What can be reached.
        jobs_models: The job boards, through which requests are cancelled.
        triton: Channel to Triton.
        log: Takes the lines of requests of which no stage tells.
        on_fault: Called with a sentence when an answer shows that Triton has to be ended.
    """

    def __init__(
        self,
        access: Access,
        jobs_models: Iterable[str],
        triton: grpc.aio.Channel,
        log: RequestLog,
        on_fault: Callable[[str], object],
    ) -> None:
        self.access = access
        self.jobs_models = frozenset(jobs_models)
        self._triton = service_pb2_grpc.GRPCInferenceServiceStub(triton)
        self._on_fault = on_fault
        self._log = log
        self.metrics = DoorMetrics()
        self.full_models = FullModels()
        self._unavailable = ""
        self._exchanges: set[Exchange] = set()
        self._cancellations: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._paused_at = -QUARANTINE_S

    def service(self) -> grpc.GenericRpcHandler:
        """Return Envoy's service `ExternalProcessor`."""
        handler = grpc.stream_stream_rpc_method_handler(
            self._process,
            request_deserializer=external_processor_pb2.ProcessingRequest.FromString,
            response_serializer=external_processor_pb2.ProcessingResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Process": handler})

    @property
    def num_live(self) -> int:
        """Requests that are with Triton."""
        return len(self._exchanges)

    def metrics_text(self) -> str:
        """Return the door's metrics, as Prometheus reads them."""
        return self.metrics.text(num_live=self.num_live, is_ready=not (self._unavailable or self._is_stopping))

    def record(self, exchange: Exchange, outcome: str, reason: str, error: str = "") -> None:
        """Count a request of which no stage tells, and write its line. Nothing that it says is in it.

        Args:
            exchange: The request.
            outcome: What has become of it.
            reason: The tag of the contract.
            error: What its caller was told; empty where those weren't words of the front.
        """
        self.metrics.requests[outcome, reason] += 1
        fields: dict[str, str | float] = {}
        if exchange.request_id:
            fields["id"] = exchange.request_id[:SHOWN_CHARACTERS]
        if exchange.model:
            fields["model"] = exchange.model[:SHOWN_CHARACTERS]
        fields |= {"outcome": outcome, "reason": reason, "protocol": "grpc" if exchange.is_grpc else "http"}
        if outcome != "refused":
            fields["total_s"] = round(time.monotonic() - exchange.came_s, 3)
        if error:
            fields["error"] = error[:SHOWN_ERROR_CHARACTERS]
        self._log.add_request(**fields)

    def set_unavailable(self, sentence: str) -> None:
        """Refuse what comes from now on with `sentence`; an empty one lets it in again."""
        self._unavailable = sentence

    @property
    def is_broken(self) -> bool:
        """Whether Triton is about to be ended, and what it still answers may be wrong."""
        return bool(self._unavailable)

    def check_words(self, message: str) -> None:
        """Look for Triton's words for a stage that it has given up; the runner is told.

        Raises:
            RefusedError: They are there: the next answers would be wrong, and Triton is ended.
        """
        if fault := fault_in_answer(message):
            if not self._unavailable:
                self._unavailable = f"{fault}; {LOST}"
                self._on_fault(str(fault))
            raise RefusedError(UNAVAILABLE, self._unavailable)

    def stop(self) -> None:
        """Take no more generations; the job boards still answer."""
        self._is_stopping = True

    def cancel_all(self) -> int:
        """Cancel what is with Triton; return how many that are. Their callers are told that the server stops."""
        for exchange in self._exchanges:
            if exchange.inference is not None:
                exchange.is_cut = True
                self._cancel_soon(exchange.inference.request_id)
        return len(self._exchanges)

    def check_available(self, model: str) -> None:
        """Refuse a request for `model` (or, where that is empty, say that the server isn't ready) where it must wait.

        Raises:
            RefusedError: The server stops, is started again, or has no room for it.
        """
        if self._unavailable:
            raise RefusedError(UNAVAILABLE, self._unavailable)
        if self._is_stopping and model not in self.jobs_models:
            raise RefusedError(UNAVAILABLE, STOPPING)
        if sentence := self.full_models.why_full(model):
            raise RefusedError(UNAVAILABLE, sentence)

    def why_lost(self) -> str:
        """Return the sentence for a request that was with Triton when that ended."""
        return STOPPING if self._is_stopping else self._unavailable or LOST

    async def _process(self, request_iterator: AsyncIterator[Any], _: object) -> AsyncIterator[Any]:
        """Answer each part of one request; after the last, find out whether its caller has left."""
        exchange = Exchange(self)
        try:
            async for message in request_iterator:
                if message.HasField("response_headers"):
                    await self._wait_after_a_pause()
                response = exchange.respond(message)
                self._note(exchange)
                yield response
        finally:
            self._forget(exchange)
            has_left = exchange.inference is not None and exchange.inference.model not in self.jobs_models
            if has_left:
                self.record(exchange, "left", "CANCELLED")
            if has_left or exchange.was_dropped:
                self._cancel_soon(exchange.request_id, is_dropped=exchange.is_grpc)

    async def watch_for_pauses(self) -> None:
        """Notice for ever when this process wasn't run for a while, and keep the log going."""
        turn = time.monotonic()
        while True:
            await asyncio.sleep(PAUSE_S / 4)
            self._log.flush()
            now = time.monotonic()
            if now - turn > PAUSE_S:
                self._paused_at = now
            turn = now

    async def _wait_after_a_pause(self) -> None:
        if (rest := self._paused_at + QUARANTINE_S - time.monotonic()) > 0:
            await asyncio.sleep(rest)

    def _note(self, exchange: Exchange) -> None:
        if exchange.inference is not None and exchange.inference.model not in self.jobs_models:
            self._exchanges.add(exchange)
        else:
            self._forget(exchange)

    def _forget(self, exchange: Exchange) -> None:
        if exchange in self._exchanges:
            self._exchanges.remove(exchange)
            if not exchange.was_full:
                self.full_models.note_freed()

    def _cancel_soon(self, request_id: str, *, is_dropped: bool = False) -> None:
        """Cancel a request in the stages; Triton drops a gRPC request by itself whose caller leaves, and no other."""
        task = asyncio.get_running_loop().create_task(self._cancel(request_id, is_dropped))
        self._cancellations.add(task)
        task.add_done_callback(self._cancellations.discard)

    async def _cancel(self, request_id: str, is_dropped: bool) -> None:
        if any(e.inference and e.inference.request_id == request_id and not e.is_cut for e in self._exchanges):
            return  # somebody else's request has the same id, and somebody waits for it
        for model in self.jobs_models:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._triton.ModelInfer(_cancellation(model, request_id, is_dropped), timeout=CANCEL_TIMEOUT_S)


def _cancellation(model: str, request_id: str, is_dropped: bool) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model)
    if is_dropped:
        request.parameters[DROPPED].bool_param = True
    for name, text in (("request_id", request_id.encode()), ("action", b"cancel")):
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
    return request
