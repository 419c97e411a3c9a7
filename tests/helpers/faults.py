"""A stage of a running server is killed or stopped: what callers see, and how long it takes until all is well again."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from server import EmbeddedServer
from tests.helpers.job_calls import Answer, generate, is_ready, wait_for_state

STEPS = 400
"""Of the requests that run while a stage fails: more than they ever get to."""
READY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Recovery:
    """What was seen after a fault; times are seconds since then.

    Attributes:
        unready_s: Until the server said that it isn't ready.
        answered_s: Until the last of the callers in flight was answered; 0 without any.
        well_s: Until a generation was answered again.
        answers: What the callers in flight got.
        audio: That generation's.
    """

    unready_s: float
    answered_s: float
    well_s: float
    answers: list[Answer]
    audio: list[float]


def reference(server: EmbeddedServer) -> list[float]:
    """Audio of a short generation, which is the same each time."""
    answer = generate(server, "reference", num_inference_steps=2, audio_length_in_s=0.64)
    assert answer.status == 200, answer.error
    return audio_of(answer)


def audio_of(answer: Answer) -> list[float]:
    """The samples."""
    return next(output["data"] for output in answer.body["outputs"] if output["name"] == "audio")


def fail_and_recover(server: EmbeddedServer, stage: str, pause_s: float | None, callers: int) -> Recovery:
    """Kill a stage's process, or stop it for a while, and watch.

    Args:
        server: Running; it starts again by itself.
        stage: The model.
        pause_s: For how long it is stopped; None kills it.
        callers: Requests that are being denoised at that moment.
    """
    with ThreadPoolExecutor(max_workers=callers + 1) as pool:
        running = [_start(server, pool, number) for number in range(callers)]
        with _failing(pool, server.stages[stage], pause_s):
            failed = time.monotonic()
            while is_ready(server):
                assert time.monotonic() < failed + READY_TIMEOUT_S, f"{stage} failed, and the server is ready"
            unready_s = time.monotonic() - failed
            answers = [future.result(timeout=READY_TIMEOUT_S) for future in running]
            while (answer := _try(server)) is None:
                assert time.monotonic() < failed + READY_TIMEOUT_S, "it doesn't come back"
            well_s = time.monotonic() - failed
    answered_s = max((answer.arrived_s - failed for answer in answers), default=0.0)
    return Recovery(unready_s, answered_s, well_s, answers, audio_of(answer))


def _start(server: EmbeddedServer, pool: ThreadPoolExecutor, number: int) -> Future[Answer]:
    request_id = f"in-flight-{time.monotonic_ns()}-{number}"
    future = pool.submit(generate, server, request_id, num_inference_steps=STEPS, audio_length_in_s=0.64)
    wait_for_state(server, request_id, "denoising")
    return future


@contextmanager
def _failing(pool: ThreadPoolExecutor, pid: int, pause_s: float | None) -> Iterator[None]:
    if pause_s is None:
        os.kill(pid, signal.SIGKILL)
        yield
        return
    os.kill(pid, signal.SIGSTOP)
    resumed = pool.submit(_resume, pid, pause_s)
    yield
    resumed.result()


def _resume(pid: int, pause_s: float) -> None:
    time.sleep(pause_s)
    with suppress(ProcessLookupError):  # it was ended in the meantime, as it should be
        os.kill(pid, signal.SIGCONT)


def _try(server: EmbeddedServer) -> Answer | None:
    answer = generate(server, f"after-{time.monotonic_ns()}", num_inference_steps=2, audio_length_in_s=0.64)
    return answer if answer.status == 200 else None
