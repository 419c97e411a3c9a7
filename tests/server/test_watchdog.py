"""Dead, stopped and stalled stages are noticed in time, and stages that compute aren't taken for stalled."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tritonclient.grpc

from server import EmbeddedServer, ServerError, watchdog
from server.stubs import ThreadLook, find_stubs
from server.watchdog import CHECK_INTERVAL_S, Fault, RestartPolicy, Watchdog, fault_in_answer, watch
from tests.helpers import tiny_repository as tiny
from tests.helpers import waiting
from tests.helpers.unkept_server import UnkeptServer

BUSY_CODE = """
import ctypes
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()) for request in requests]

    def answer(self, x):
        ctypes.PyDLL(None).usleep(int(1e6 * x[0]))  # with Python's lock
        end = time.monotonic() + x[1]
        while time.monotonic() < end:
            sum(range(100000))
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
"""
BUSY_CONFIG = tiny.tensors("TYPE_FP32 dims: [ -1 ]", "TYPE_FP32 dims: [ -1 ]")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    repository = tmp_path_factory.mktemp("watchdog")
    tiny.add_double(repository, "audioldm2_music_unet")
    tiny.add_python_model(repository, "busy", BUSY_CODE, BUSY_CONFIG)
    return repository


@pytest.fixture(scope="module")
def server(repository) -> EmbeddedServer:
    """One that no test harms."""
    with UnkeptServer(repository, ready_timeout_s=60, stop_timeout_s=5) as server:
        yield server


@pytest.fixture
def victim(repository) -> EmbeddedServer:
    """One that may be harmed."""
    with UnkeptServer(repository, ready_timeout_s=60, stop_timeout_s=5) as server:
        yield server


def ask(server: EmbeddedServer, name: str = "busy", x=(0.0, 0.0)) -> np.ndarray:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        tensor = tritonclient.grpc.InferInput("x", [len(x)], "FP32")
        tensor.set_data_from_numpy(np.array(x, np.float32))
        return client.infer(name, [tensor]).as_numpy("y")


def time_to_fault(dog: Watchdog, timeout_s: float = 5.0) -> tuple[Fault, float]:
    """Check as often as the runner does; returns the fault, and after how many seconds it was seen."""
    start = time.monotonic()
    while time.monotonic() < start + timeout_s:
        time.sleep(CHECK_INTERVAL_S)
        if fault := dog.check():
            return fault, time.monotonic() - start
    pytest.fail(f"no fault within {timeout_s} s")


def faults_while(dog: Watchdog, is_going_on) -> list[str]:
    faults = []
    while is_going_on():
        time.sleep(CHECK_INTERVAL_S)
        faults += [str(fault)] if (fault := dog.check()) else []
    return faults


@pytest.mark.server
def test_stages_are_known_by_their_models_and_their_processes(server):
    with Watchdog(server.pid) as dog:
        assert dog.stages == {stub.model: stub.pid for stub in find_stubs(server.pid)}
        assert dog.stages.keys() == {"audioldm2_music_unet", "busy"}


@pytest.mark.server
def test_computing_with_all_cores_or_with_pythons_lock_is_no_fault(server):
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    request = threading.Thread(target=ask, args=[server, "busy", (1.5, 1.5)])
    try:
        with Watchdog(server.pid) as dog:
            request.start()
            assert faults_while(dog, request.is_alive) == []
            assert all(process._is_steady for process in dog._stubs.values()), "no heartbeat was found"
    finally:
        for process in spinning:
            process.kill()
            process.wait()
        request.join()


@pytest.mark.server
def test_watching_takes_less_than_one_percent_of_a_core(server):
    with Watchdog(server.pid) as dog:
        start, used = time.monotonic(), time.thread_time()
        assert faults_while(dog, lambda: time.monotonic() < start + 4) == []
        assert (time.thread_time() - used) / (time.monotonic() - start) < 0.01


@pytest.mark.server
def test_a_stopped_stage_and_a_dead_one_are_faults_before_triton_gives_wrong_tensors(victim):
    seen = []
    end = watch(Watchdog(victim.pid), seen.append)
    with Watchdog(victim.pid) as dog:
        stub = dog.stages["audioldm2_music_unet"]
        os.kill(stub, signal.SIGSTOP)
        fault, seconds = time_to_fault(dog)
        assert str(fault).startswith("stage audioldm2_music_unet has not run for 0.")
        assert str(fault).endswith(" s (stopped)")
        assert seconds < 0.5  # 0.3 on a machine that is free
        os.kill(stub, signal.SIGKILL)
        fault, seconds = time_to_fault(dog)
        assert str(fault) == "stage audioldm2_music_unet died (signal 9)"
        assert seconds < 0.4  # 0.2 on a machine that is free
        assert fault.stage == "audioldm2_music_unet"
        os.kill(victim.pid, signal.SIGKILL)
        assert str(time_to_fault(dog)[0]).startswith("tritonserver died")  # its supervisor knows the signal
    end()
    assert [fault.stage for fault in seen] == ["audioldm2_music_unet"], "the thread has to tell the first fault, once"


@pytest.mark.server
def test_a_stopped_tritonserver_is_a_fault(victim):
    with Watchdog(victim.pid) as dog:
        os.kill(victim.pid, signal.SIGSTOP)
        fault, seconds = time_to_fault(dog)
        os.kill(victim.pid, signal.SIGCONT)
    assert str(fault).startswith("tritonserver has not run for 0.")
    assert seconds < 0.5


@pytest.mark.server
def test_triton_tells_in_its_answer_alone_that_it_has_given_a_stage_up(victim):
    [stub] = [stub for stub in find_stubs(victim.pid) if stub.model == "busy"]
    os.kill(stub.pid, signal.SIGSTOP)
    with pytest.raises(tritonclient.grpc.InferenceServerException) as error:
        ask(victim)
    assert fault_in_answer(str(error.value)) == Fault("busy", "was given up by Triton (its process is not healthy)")
    assert "is not healthy" not in victim.log_text()
    assert fault_in_answer("[INVALID_ARG] prompt: must not be blank") is None


class FakeThread:
    """A thread of a process that the test plays."""

    def __init__(self, *_: int) -> None:
        self.state, self.switches = "S", 10

    def look(self) -> ThreadLook:
        return ThreadLook(self.state, self.switches)

    def close(self) -> None:
        pass


class Play:
    """A server of one stage, without processes; time goes on as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.others = 0.0, 100
        monkeypatch.setattr(watchdog, "Thread", FakeThread)
        monkeypatch.setattr(watchdog, "thread_ids", lambda pid: [pid, pid + 1])
        monkeypatch.setattr(watchdog, "process_ids", lambda: iter([1, 2]))
        monkeypatch.setattr(watchdog, "parent_of", lambda pid: pid - 1)
        monkeypatch.setattr(watchdog, "stub_of", lambda pid: watchdog.Stub(pid, "vae"))
        monkeypatch.setattr(watchdog, "switches_of_all_threads", lambda pid: self.others if pid == 2 else self.server)
        self.server = 1000
        self.dog = Watchdog(1, clock=lambda: self.now)
        self.beat = self.dog._stubs[2]._thread
        self.run(3.0)

    def run(self, seconds: float, step: float = 0.1, beats: bool = True, others: bool = True) -> Fault | None:
        """Go on, checking at each step; the beat comes every 0.3 s, and stops at the first fault."""
        end = self.now + seconds
        while self.now < end - 1e-6:
            before = int(self.now / 0.3 + 1e-6)
            self.now += step
            self.server += 1
            self.beat.switches += beats * (int(self.now / 0.3 + 1e-6) - before)
            self.others += others
            if fault := self.dog.check():
                return fault
        return None


@pytest.fixture
def play(monkeypatch):
    return Play(monkeypatch)


def test_a_stage_of_which_no_thread_runs_is_a_fault_within_a_second(play):
    start = play.now
    fault = play.run(5, beats=False, others=False)
    assert str(fault) == "stage vae has not run for 0.7 s (stalled)"
    assert play.now - start < 1.0


def test_a_late_heartbeat_is_no_fault_while_other_threads_run(play):
    assert play.run(20, beats=False, others=True) is None


def test_a_thread_without_a_steady_beat_is_not_taken_for_the_heartbeat(play):
    play.dog._stubs[2]._steady_beats = 0
    assert play.run(20, beats=False, others=False) is None


def test_a_heartbeat_that_the_kernel_does_not_tell_is_no_fault(play):
    play.beat.switches = None
    play.dog._stubs[2]._check_silence = pytest.fail
    play.now += 10
    assert play.dog.check() is None


def test_a_check_that_comes_late_itself_does_not_count_as_silence_of_the_others(play):
    assert play.run(0.9, step=0.9, beats=False, others=False) is None
    assert play.run(3) is None


def test_a_watchdog_that_slept_alone_reports_nothing(play):
    for seconds, beats in ((1.1, 3), (1.3, 4), (2.0, 5), (60, 190)):
        play.now += seconds
        play.beat.switches += beats
        assert play.dog.check() is None


@pytest.mark.parametrize(("seconds", "switches"), [(1.3, 2), (2.0, 0), (2.0, 3), (60, 3)])
def test_a_stage_that_slept_with_the_whole_machine_is_a_fault_for_triton_may_have_given_it_up(play, seconds, switches):
    play.now += seconds
    play.beat.switches += switches
    sentence = f"stage vae has not run for {seconds:.1f} s (the machine was paused, or far too busy)"
    assert str(play.dog.check()) == sentence


def test_a_stage_that_wakes_later_than_the_watchdog_is_a_fault_too(play):
    play.now += 2
    play.beat.state = "T"
    assert play.dog.check() is None
    play.now += 0.05
    play.beat.state = "S"
    assert "the machine was paused" in str(play.dog.check())


def test_a_tritonserver_of_which_no_thread_runs_is_a_fault(play, monkeypatch):
    monkeypatch.setattr(watchdog, "switches_of_all_threads", lambda _: 7)
    fault = play.run(10)
    assert str(fault).startswith("tritonserver has not run for ")
    assert str(fault).endswith("(stalled)")


def test_a_debuggers_short_stop_is_no_fault(play):
    for state in "tTtT":
        play.beat.state = state
        play.now += 0.1
        assert play.dog.check() is None
        play.beat.state = "S"
        assert play.run(1) is None


def test_restarts_come_at_once_then_later_and_later_and_then_no_more():
    policy = RestartPolicy(max_restarts=5, stable_s=300, clock=lambda: now)
    now = 0.0
    delays = []
    for _ in range(5):
        delays.append(policy.delay_s("stage vae died"))
        now += 500  # the start of a large model
        policy.ready()
        now += 20
    assert delays == [0, 1, 2, 4, 8]
    with pytest.raises(
        ServerError,
        match=r"stage vae died \(signal 9\); this is failure 6 without 300 s of readiness .* isn't started again",
    ):
        policy.delay_s(Fault("vae", "died (signal 9)"))


def test_failures_are_forgotten_after_the_server_was_ready_for_long():
    policy = RestartPolicy(max_restarts=1, stable_s=300, clock=lambda: now)
    now = 0.0
    for _ in range(5):
        policy.ready()
        now += 301
        assert policy.delay_s("it died") == 0
    policy.ready()
    now += 299
    with pytest.raises(ServerError):
        policy.delay_s("it died")


def test_the_delay_has_an_end():
    policy = RestartPolicy(max_restarts=20, clock=lambda: 0.0)
    assert max(policy.delay_s("it died") for _ in range(20)) == 30


def test_no_fault_is_told_after_the_end_of_the_watch(monkeypatch):
    play = Play(monkeypatch)
    seen, checked = [], threading.Event()

    def end_and_find_a_fault() -> Fault:
        end()
        checked.set()
        return Fault("vae", "died")

    monkeypatch.setattr(play.dog, "check", end_and_find_a_fault)
    end = watch(play.dog, seen.append)
    assert checked.wait(5)
    waiting.wait_until(lambda: "watchdog" not in [thread.name for thread in threading.enumerate()], 5, "it has ended")
    assert seen == []


def test_a_watchdog_that_ends_itself_from_its_callback_does_not_wait_for_itself(monkeypatch):
    play = Play(monkeypatch)
    play.beat.state = "Z"
    ends = []
    end = watch(play.dog, lambda _: (end(), ends.append(1)))
    waiting.wait_until(lambda: ends, 5, "the callback has returned")
