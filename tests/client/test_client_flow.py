"""What is sent when: retries, failover, cancelling, waiting. No server and no clock: the flows are pure."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from audioldm2_client import (
    AudioLDM2Error,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    Progress,
    ServerBusyError,
    ServerUnreachableError,
)
from audioldm2_client._cancel_token import CallCancelledError, CancelToken
from audioldm2_client._errors import error_from_status
from audioldm2_client._flow import (
    LONGEST_DELAY_S,
    AskReady,
    Flow,
    Infer,
    Route,
    Sleep,
    backoff_s,
    cancel_flow,
    infer_flow,
    jobs_flow,
    wait_until_ready_flow,
)
from audioldm2_client._jobs import build_jobs_request, jobs_model_name, parse_progress
from audioldm2_client._request import GenerationOptions, build_request
from audioldm2_client._url import parse_urls

REQUEST = build_request("x", GenerationOptions(), model_name="audioldm2", request_id="r1", timeout_s=10)
BUSY = ServerBusyError("busy", safe_to_retry=True)
NO_CONNECTION = ServerUnreachableError("refused", safe_to_retry=True)
LOST = ServerUnreachableError("lost", safe_to_retry=False)
A, B = parse_urls(["a:1", "b:1"])


class World:
    """Plays the servers and the clock. Every inference takes `call_s`; its outcome is the next of `outcomes`."""

    def __init__(self, *outcomes: object, call_s: float = 0.0) -> None:
        self.outcomes = list(outcomes)
        self.call_s = call_s
        self.now = 100.0
        self.asked: list[Infer] = []
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def run(self, flow: Flow):
        try:
            step = next(flow)
            while True:
                if isinstance(step, Sleep):
                    self.slept.append(step.seconds)
                    self.now += step.seconds
                    step = flow.send(None)
                    continue
                if isinstance(step, Infer):
                    self.asked.append(step)
                self.now += self.call_s
                outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
                step = flow.throw(outcome) if isinstance(outcome, AudioLDM2Error) else flow.send(outcome)
        except StopIteration as end:
            return end.value

    def infer(self, *addresses, max_retries: int = 2):
        return self.run(infer_flow(REQUEST, Route(addresses or (A,)), max_retries, self.clock))


def answer(state: str, *numbers: int) -> Callable[[str], np.ndarray]:
    names = ("step", "total_steps", "requests_ahead")
    values = dict(zip(names, numbers or (0, 0, 0), strict=True))
    return lambda name: np.array([state.encode()], object) if name == "state" else np.array([values[name]], np.int32)


@pytest.mark.parametrize("error", [BUSY, NO_CONNECTION])
def test_what_the_server_took_no_part_of_is_sent_again(error):
    world = World(error, error, "answer")
    assert world.infer() == "answer"
    assert len(world.asked) == 3
    assert len(world.slept) == 2
    assert {step.request.id for step in world.asked} == {"r1"}


@pytest.mark.parametrize("error", [LOST, InvalidRequestError("x"), DeadlineExceededError("x", server_message="x")])
def test_what_may_have_been_taken_is_never_sent_again(error):
    world = World(error)
    with pytest.raises(type(error)) as caught:
        world.infer(A, B)
    assert caught.value is error
    assert [step.request.model_name for step in world.asked] == ["audioldm2"] + ["jobs"] * (error is LOST)


def test_server_that_was_lost_is_told_to_stop():
    world = World(LOST, answer("denoising", 1, 2, 0))
    with pytest.raises(ServerUnreachableError):
        world.infer(A, B)
    told = {tensor.name: tensor.data.tolist() for tensor in world.asked[1].request.inputs}
    assert told == {"request_id": [b"r1"], "action": [b"cancel"]}
    assert world.asked[1].address == A


@pytest.mark.parametrize("status", [502, 504])
def test_server_behind_a_gateway_that_gave_up_is_told_to_stop_before_the_request_is_sent_again(status):
    gave_up = error_from_status("StatusCode.UNAVAILABLE", f"Received http2 header with status: {status}", REQUEST, A)
    world = World(gave_up, answer("denoising", 1, 2, 0), "answer")
    assert world.infer() == "answer"
    assert [step.request.model_name for step in world.asked] == ["audioldm2", "jobs", "audioldm2"]


def test_pause_that_the_server_asks_for_is_kept():
    world = World(ServerBusyError("busy", safe_to_retry=True, retry_after_s=3.0), BUSY, "answer")
    assert world.infer() == "answer"
    assert world.slept[0] == 3.0
    assert world.slept[1] < 1


def test_pause_beyond_the_deadline_is_not_waited_for():
    world = World(ServerBusyError("busy", safe_to_retry=True, retry_after_s=3600.0))
    with pytest.raises(ServerBusyError):
        world.infer()
    assert world.slept == []


def test_of_several_servers_the_shortest_pause_counts():
    asking = [ServerBusyError("busy", safe_to_retry=True, retry_after_s=after_s) for after_s in (8.0, 2.0)]
    world = World(*asking, "answer")
    assert world.infer(A, B) == "answer"
    assert world.slept == [2.0]


def test_address_that_is_wrong_is_not_told_to_stop():
    world = World(ServerUnreachableError("speaks HTTP", misconfigured=True))
    with pytest.raises(ServerUnreachableError):
        world.infer()
    assert len(world.asked) == 1


@pytest.mark.parametrize("max_retries", [0, 1, 4])
def test_retries_are_counted_and_the_last_error_comes_out(max_retries):
    world = World(BUSY)
    with pytest.raises(ServerBusyError):
        world.infer(max_retries=max_retries)
    assert len(world.asked) == 1 + max_retries


def test_no_attempt_begins_after_the_deadline_and_each_is_told_what_is_left():
    world = World(BUSY, call_s=3.0)
    with pytest.raises(ServerBusyError):
        world.infer(max_retries=100)
    assert world.now <= 100 + 10 + 3
    left = [step.request.timeout_s for step in world.asked]
    assert left[0] == 10
    assert left == sorted(left, reverse=True)
    assert min(left) > 0
    assert all(earlier - later >= 3 for earlier, later in itertools.pairwise(left))


def test_passed_deadline_names_the_time_of_the_whole_call():
    world = World(BUSY, DeadlineExceededError("no answer within 7 s"), call_s=3.0)
    with pytest.raises(DeadlineExceededError, match="within 10 s"):
        world.infer()


def test_pauses_grow_up_to_a_limit_with_jitter():
    for failures in range(1, 40):
        pauses = {backoff_s(failures) for _ in range(20)}
        assert len(pauses) > 1
        assert max(pauses) <= LONGEST_DELAY_S
    assert max(backoff_s(1) for _ in range(20)) <= min(backoff_s(3) for _ in range(20))


@pytest.mark.parametrize("error", [BUSY, NO_CONNECTION])
def test_next_address_is_tried_at_once_also_without_retries(error):
    world = World(error, "answer")
    assert world.infer(A, B, max_retries=0) == "answer"
    assert [step.address for step in world.asked] == [A, B]
    assert world.slept == []


def test_every_address_is_tried_before_the_first_pause():
    world = World(NO_CONNECTION)
    with pytest.raises(ServerUnreachableError):
        world.infer(A, B, max_retries=1)
    assert [step.address for step in world.asked] == [A, B, A, B]
    assert len(world.slept) == 1


def test_the_address_that_answered_last_is_asked_first():
    route = Route((A, B))
    world = World(NO_CONNECTION, "answer")
    world.run(infer_flow(REQUEST, route, 0, world.clock))
    world.run(infer_flow(REQUEST, route, 0, world.clock))
    assert [step.address for step in world.asked] == [A, B, B]


@pytest.mark.parametrize(
    ("status", "message", "safe"),
    [
        ("StatusCode.UNAVAILABLE", "Exceeds maximum queue size", True),
        ("503", "[UNAVAILABLE] the queue is full", True),
        ("StatusCode.UNAVAILABLE", "failed to connect to all addresses; last error: Connection refused", True),
        ("StatusCode.UNAVAILABLE", "DNS resolution failed for nosuch.invalid:8001", True),
        ("StatusCode.UNAVAILABLE", "failed to connect to all addresses; CERTIFICATE_VERIFY_FAILED", False),
        ("StatusCode.UNAVAILABLE", "Socket closed", False),
        ("StatusCode.UNAVAILABLE", "recvmsg:Connection reset by peer", False),
        ("StatusCode.UNAVAILABLE", "upstream connect error or disconnect/reset before headers", False),
        ("StatusCode.UNAVAILABLE", "Received http2 header with status: 500", False),
        ("500", "boom", False),
        ("400", "[DEADLINE] over", False),
    ],
)
def test_only_refusals_and_connections_that_were_never_made_are_safe(status, message, safe):
    assert error_from_status(status, message, REQUEST, A).safe_to_retry is safe


def test_jobs_model_is_named_after_the_ensemble():
    names = ("audioldm2", "audioldm2_cached", "audioldm2_music", "audioldm2_music_cached")
    jobs, music = "jobs", "audioldm2_music_jobs"
    assert [jobs_model_name(name) for name in names] == [jobs, jobs, music, music]


def test_progress_is_asked_for_the_id_and_read():
    world = World(answer("denoising", 3, 20, 0))
    assert world.run(jobs_flow(REQUEST, A, "status")) == Progress("denoising", 3, 20, 0)
    (step,) = world.asked
    assert step.request.model_name == "jobs"
    sent = {tensor.name: tensor.data.tolist() for tensor in step.request.inputs}
    assert sent == {"request_id": [b"r1"], "action": [b"status"]}
    assert step.request.id != "r1"


def test_progress_is_unknown_while_nothing_was_sent():
    assert World("unused").run(jobs_flow(REQUEST, None, "status")) == Progress("unknown")


def test_missing_jobs_model_says_what_that_means():
    world = World(ModelNotFoundError("no model 'jobs'"))
    with pytest.raises(ModelNotFoundError, match=r"can't tell progress, because its model 'jobs' isn't there"):
        world.run(jobs_flow(REQUEST, A, "status"))


def test_answer_that_breaks_the_contract_is_a_server_fault():
    request = build_jobs_request(REQUEST, "status", 5)
    with pytest.raises(AudioLDM2Error, match=r"must say one of queued, .*got 'dancing'"):
        parse_progress(answer("dancing"), request)
    with pytest.raises(AudioLDM2Error, match="output 'state'"):
        parse_progress(lambda _: None, request)


def cancel(world: World, is_over: Callable[[], bool] = lambda: False) -> bool:
    return world.run(cancel_flow(REQUEST, lambda: A, is_over, world.clock))


def test_cancel_is_repeated_until_the_server_knows_the_request():
    world = World(answer("unknown"), BUSY, answer("queued"))
    assert cancel(world) is True
    assert len(world.asked) == 3


def test_cancel_gives_up_after_two_seconds_or_when_the_request_is_over():
    world = World(answer("unknown"), call_s=0.01)
    assert cancel(world) is False
    assert 101 < world.now < 102.2
    world = World(answer("unknown"))
    assert cancel(world, is_over=lambda: len(world.asked) == 2) is False
    assert len(world.asked) == 2


@pytest.mark.parametrize("error", [ModelNotFoundError("x"), NO_CONNECTION, LOST])
def test_cancel_does_not_insist_where_nobody_can_be_told(error):
    world = World(error)
    assert cancel(world) is False
    assert len(world.asked) == 1


def test_waiting_for_a_server_ends_when_one_of_them_is_ready_and_at_the_deadline():
    world = World(False, False, False, True)
    world.run(wait_until_ready_flow("audioldm2", Route((A, B)), 60, world.clock))
    assert world.now < 101
    world = World(False)
    with pytest.raises(DeadlineExceededError, match=r"'audioldm2' wasn't ready at grpc://a:1, grpc://b:1 within 2 s"):
        world.run(wait_until_ready_flow("audioldm2", Route((A, B)), 2, world.clock))
    assert 102 <= world.now < 103


def test_readiness_is_asked_for_the_ensemble():
    flow = wait_until_ready_flow("audioldm2_music", Route((A,)), 60, lambda: 0.0)
    step = next(flow)
    assert isinstance(step, AskReady)
    assert step.model_name == "audioldm2_music"


def test_what_was_cancelled_before_it_was_sent_is_never_sent():
    token, noted = CancelToken(), []
    token.begin_attempt(lambda: noted.append(A))
    token.refuse_attempts()
    assert not token.cancelled  # what has begun goes on until the server was told
    with pytest.raises(CallCancelledError):
        token.begin_attempt(lambda: noted.append(B))
    with pytest.raises(CallCancelledError):
        token.sleep(60)
    assert noted == [A]
