"""What is sent when, and what follows from the answer: retries, failover, cancelling, waiting. Pure.

A flow is a generator. It yields what is to be done next (`Infer`, `AskReady` or `Sleep`), is sent the outcome or thrown
the `AudioLDM2Error`, and returns its result. The blocking client and the asyncio client only drive it.
"""

import contextlib
import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from audioldm2_client._errors import client_deadline_error, not_ready_error
from audioldm2_client._exceptions import (
    AudioLDM2Error,
    DeadlineExceededError,
    ModelNotFoundError,
    ServerBusyError,
    ServerUnreachableError,
)
from audioldm2_client._jobs import JOBS_TIMEOUT_S, Action, Progress, build_jobs_request, no_jobs_error, parse_progress
from audioldm2_client._request import InferenceRequest
from audioldm2_client._result import GetTensor
from audioldm2_client._url import ServerAddress

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 8.0
READY_INTERVAL_S = 0.25

CANCEL_WINDOW_S = 2.0
"""How long a cancellation is repeated while the server doesn't know the request: it may be on its way."""

CANCEL_INTERVAL_S = 0.05

T = TypeVar("T")
Clock = Callable[[], float]


@dataclass(frozen=True)
class Infer:
    """Run one inference; the outcome is `GetTensor`."""

    address: ServerAddress
    request: InferenceRequest


@dataclass(frozen=True)
class AskReady:
    """Ask whether a model is ready; the outcome is a bool."""

    address: ServerAddress
    model_name: str
    timeout_s: float


@dataclass(frozen=True)
class Sleep:
    """Do nothing for a while; there is no outcome."""

    seconds: float


Step = Infer | AskReady | Sleep
Flow = Generator[Step, Any, T]


class Route:
    """The servers of one client. The one that answered last is asked first."""

    def __init__(self, addresses: tuple[ServerAddress, ...]) -> None:
        self._addresses = addresses
        self._preferred = addresses[0]

    def order(self) -> list[ServerAddress]:
        """All addresses in the order in which they are tried."""
        first = self._addresses.index(self._preferred)
        return [*self._addresses[first:], *self._addresses[:first]]

    def prefer(self, address: ServerAddress) -> None:
        """Note that a server has answered."""
        self._preferred = address

    def __str__(self) -> str:
        return ", ".join(map(str, self._addresses))


def backoff_s(failures: int) -> float:
    """Return the time to wait after so many failures in a row: doubled each time, up to a limit, with jitter."""
    longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(failures - 1, 16))
    return random.uniform(longest / 2, longest)


def infer_flow(request: InferenceRequest, route: Route, max_retries: int, clock: Clock) -> Flow[GetTensor]:
    """Run one inference on the first server that takes it.

    A failure is followed by another attempt only where the server took no part of the request: on the next address at
    once, and after all of them once more for each of `max_retries`, with a growing delay, or the one that they all ask
    for; never beyond the deadline.
    """
    start, left_s = clock(), request.timeout_s
    asked_pauses_s: list[float] = []
    failure: AudioLDM2Error = client_deadline_error(request, route.order()[0])
    for address, pause_s in _attempts(route, max_retries, asked_pauses_s):
        if pause_s >= left_s:
            break
        if pause_s:
            yield Sleep(pause_s)
            left_s = max(request.timeout_s - (clock() - start), 1e-3)
        try:
            get_tensor: GetTensor = yield Infer(address, replace(request, timeout_s=left_s))
        except DeadlineExceededError as error:
            raise _of_the_whole_call(error, request, address) from error.__cause__
        except (ServerBusyError, ServerUnreachableError) as error:
            asked_pauses_s.append((yield from _prepare_retry(error, request, address)))
            failure, left_s = error, request.timeout_s - (clock() - start)
        else:
            route.prefer(address)
            return get_tensor
    raise failure


def _of_the_whole_call(
    error: DeadlineExceededError, request: InferenceRequest, address: ServerAddress
) -> DeadlineExceededError:
    """Name the time that the whole call had, not what was left for its last attempt; the server's words stay."""
    return error if error.server_message is not None else client_deadline_error(request, address)


def _prepare_retry(error: AudioLDM2Error, request: InferenceRequest, address: ServerAddress) -> Flow[float]:
    """End what the server may run of the request; return the pause that it asks for, seconds.

    Raises:
        AudioLDM2Error: the error itself, where sending the request again isn't safe.
    """
    if _may_have_been_taken(error):
        yield from _stop_what_was_lost(request, address)
    if not error.safe_to_retry:
        raise error
    return error.retry_after_s or 0.0


def _may_have_been_taken(error: AudioLDM2Error) -> bool:
    """Whether the server may run the request: a connection was lost, or a gateway (502, 504) has lost its own."""
    if isinstance(error, ServerBusyError) or error.misconfigured:
        return False
    return not error.safe_to_retry or error.server_message is not None


def may_still_run(error: BaseException) -> bool:
    """Return whether a generation that ended here with this may go on at the server, which wasn't told of it yet.

    That is where the client's own clock has ended it, and where whatever waited for it was ended from outside.
    """
    if isinstance(error, DeadlineExceededError):
        return error.server_message is None
    return not isinstance(error, Exception)


def _stop_what_was_lost(request: InferenceRequest, address: ServerAddress) -> Flow[None]:
    """Tell the server, if it is there, that nobody waits for the answer any more."""
    with contextlib.suppress(AudioLDM2Error):
        yield from jobs_flow(request, address, "cancel", CANCEL_WINDOW_S)


def _attempts(route: Route, max_retries: int, asked_pauses_s: list[float]) -> Iterator[tuple[ServerAddress, float]]:
    """Yield the address of every attempt and the pause before it, seconds.

    Args:
        route: the servers.
        max_retries: how often all of them are tried again.
        asked_pauses_s: what each server asked for in the round before; emptied for the next.
    """
    for failures in range(max_retries + 1):
        round_pause_s = max(backoff_s(failures), min(asked_pauses_s)) if failures else 0.0
        asked_pauses_s.clear()
        for index, address in enumerate(route.order()):
            yield address, 0.0 if index else round_pause_s


def jobs_flow(
    generation: InferenceRequest, address: ServerAddress | None, action: Action, timeout_s: float = JOBS_TIMEOUT_S
) -> Flow[Progress]:
    """Ask the jobs model of the server that has the generation; None means that none was asked for it yet."""
    if address is None:
        return Progress("unknown")
    request = build_jobs_request(generation, action, timeout_s)
    try:
        get_tensor: GetTensor = yield Infer(address, request)
    except ModelNotFoundError as error:
        raise no_jobs_error(error, request) from error
    return parse_progress(get_tensor, request)


def cancel_flow(
    generation: InferenceRequest,
    get_address: Callable[[], ServerAddress | None],
    is_over: Callable[[], bool],
    clock: Clock,
) -> Flow[bool]:
    """Make the server end a generation; return whether it was told.

    It may not have arrived there yet: what the server doesn't know is asked for again, for a while.
    """
    end = clock() + CANCEL_WINDOW_S
    while not is_over() and (left_s := end - clock()) > 0 and (address := get_address()) is not None:
        try:
            progress = yield from jobs_flow(generation, address, "cancel", left_s)
        except AudioLDM2Error as error:
            if isinstance(error, (ModelNotFoundError, ServerUnreachableError)):
                return False
        else:
            if progress.state != "unknown":
                return True
        yield Sleep(CANCEL_INTERVAL_S)
    return False


def ready_flow(model_name: str, route: Route, timeout_s: float) -> Flow[bool]:
    """Ask whether one of the servers can generate."""
    for address in route.order():
        try:
            if (yield AskReady(address, model_name, timeout_s)):
                route.prefer(address)
                return True
        except AudioLDM2Error:
            continue
    return False


def wait_until_ready_flow(model_name: str, route: Route, timeout_s: float, clock: Clock) -> Flow[None]:
    """Ask until one of the servers can generate.

    Raises:
        DeadlineExceededError: none can in time.
    """
    end = clock() + timeout_s
    while (left_s := end - clock()) > 0:
        if (yield from ready_flow(model_name, route, min(left_s, JOBS_TIMEOUT_S))):
            return
        yield Sleep(max(0.0, min(READY_INTERVAL_S, end - clock())))
    raise not_ready_error(model_name, str(route), timeout_s)
