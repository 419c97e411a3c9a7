"""The callers of a soak: they do what was drawn, and keep what they were told."""

import asyncio
import contextlib
from collections.abc import Iterable

from benchmarks.server_process import Address
from benchmarks.soak_plan import Action, Deed, Seen
from benchmarks.wire import LEFT, OK, PROTOCOLS, Answer, Caller, GrpcCaller, HttpCaller, Value, WireRequest

CALLERS = 12
POLL_S = 0.05
ANSWER_TIMEOUT_S = 120.0
REFERENCE: dict[str, Value | list[str]] = {
    "prompt": "a dog",
    "num_inference_steps": 5,
    "audio_length_in_s": 1.28,
    "seed": 7,
}
_DEEP_JSON = b'{"prompt":' + b"[" * 1000 + b"]" * 1000 + b"}"
_NO_MODEL = "no-such-model"


class SoakCallers:
    """Callers over HTTP and gRPC, with connections that are kept and new ones.

    Args:
        address: The server's.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._kept: dict[str, Caller] = {}
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "SoakCallers":
        for protocol in PROTOCOLS:
            self._kept[protocol] = await self._stack.enter_async_context(self._caller(protocol))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def run(self, actions: Iterable[Action]) -> list[Seen]:
        """Let callers do all of it, some at a time; return what they saw once the last one has left."""
        waiting = iter(actions)
        seen = []

        async def one_caller() -> None:
            for action in waiting:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    answer = await self._do(action)
                seen.append(Seen(action, answer.outcome, answer.sentence))

        await asyncio.gather(*(one_caller() for _ in range(CALLERS)))
        return seen

    async def reference(self, prefix: str) -> set[bytes]:
        """Return the audio of the same request over each protocol: one, if all is well.

        Args:
            prefix: Of the requests' ids.
        """
        requests = {name: WireRequest(f"{prefix}-{name}", REFERENCE) for name in self._kept}
        answers = [await caller.send(requests[name]) for name, caller in self._kept.items()]
        if any(answer.outcome != OK for answer in answers):
            raise RuntimeError(f"a good request was not answered: {answers}")
        return {answer.output for answer in answers}

    async def live(self, request_ids: Iterable[str]) -> list[str]:
        """Return which of some requests the job board takes for live."""
        states = {request_id: await self._ask(request_id, "status") for request_id in request_ids}
        return [request_id for request_id, state in states.items() if state in ("queued", "denoising", "decoding")]

    async def _do(self, action: Action) -> Answer:
        if action.keeps_connection:
            return await self._do_with(self._kept[action.protocol], action)
        async with self._caller(action.protocol) as caller:
            return await self._do_with(caller, action)

    async def _do_with(self, caller: Caller, action: Action) -> Answer:
        match action.deed:
            case Deed.IS_STOPPED:
                return await self._be_stopped(caller, action.request)
            case Deed.GIVES_UP:
                return await caller.send(action.request, max(action.after_s, 0.001))
            case Deed.LEAVES:
                return await self._leave(caller, action)
            case Deed.CANCELS | Deed.POLLS:
                answer = asyncio.create_task(caller.send(action.request))
                if action.deed is Deed.POLLS:
                    while not answer.done():
                        await self._ask(action.request.request_id, "status")
                        await asyncio.sleep(POLL_S)
                else:
                    await asyncio.sleep(action.after_s)
                    await self._ask(action.request.request_id, "cancel")
                return await answer
        return await caller.send(action.request)

    async def _leave(self, caller: Caller, action: Action) -> Answer:
        try:
            async with asyncio.timeout(action.after_s):
                return await caller.send(action.request)
        except TimeoutError:
            return Answer(LEFT)

    async def _be_stopped(self, caller: Caller, request: WireRequest) -> Answer:
        """Send what never reaches Triton."""
        if isinstance(caller, HttpCaller):
            return await caller.post("/audioldm2/generate", _DEEP_JSON)
        answer = await caller.send(WireRequest(request.request_id, request.inputs, model=_NO_MODEL))
        return Answer("INVALID_ARG" if _NO_MODEL in answer.sentence else answer.outcome, answer.sentence)

    async def _ask(self, request_id: str, action: str) -> str:
        """Ask the job board, and return the state."""
        request = WireRequest("", {"request_id": request_id, "action": action}, model="jobs", output="state")
        answer = await self._kept["gRPC"].send(request)
        return answer.output[4:].decode() if answer.outcome == OK else answer.outcome

    def _caller(self, protocol: str) -> Caller:
        return HttpCaller(self._address.http) if protocol == "HTTP" else GrpcCaller(self._address.grpc)
