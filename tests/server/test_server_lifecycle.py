"""However the runner or tritonserver ends, no process, temporary folder or shared memory stays behind."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from server import EmbeddedServer, ServerError
from server.installation import find_installation
from tests.helpers import tiny_repository as tiny
from tests.helpers import waiting
from tests.helpers.server_runner import END_TIMEOUT_S, Runner, is_running

pytestmark = pytest.mark.server


@pytest.fixture
def start(tmp_path):
    """Start a runner over one ONNX model; whatever the test does to it, it is dead in the end."""
    started = []

    def run(*arguments):
        tiny.add_double(tmp_path / "repository")
        started.append(Runner(tmp_path, *arguments))
        return started[0]

    yield run
    for runner in started:
        runner.process.kill()
        runner.end()


@pytest.fixture
def runner(start):
    runner = start()
    assert runner.wait_until_ready().startswith("Ready: ")
    assert len(tiny.shared_memory_of(runner.process.pid)) == 1, "the model's shared memory bears another name"
    return runner


def test_sigterm_ends_the_runner_without_a_trace(runner):
    runner.process.send_signal(signal.SIGTERM)
    assert runner.end() == 0
    assert runner.traces() == []
    assert runner.stderr.read_text() == ""


def test_onnx_runtime_does_not_phone_home_and_openmp_does_not_spin(runner):
    stub = runner.pid_of("triton_python_backend_stub")
    assert b"ORT_DISABLE_TELEMETRY=1\0" in Path(f"/proc/{stub}/environ").read_bytes()
    assert b"GOMP_SPINCOUNT=3000\0" in Path(f"/proc/{stub}/environ").read_bytes()
    assert [path.name for path in runner.temporary.rglob(".ses")] == [], "its telemetry has opened a session"


def test_ctrl_c_ends_the_runner_without_a_trace(runner):
    runner.process.send_signal(signal.SIGINT)
    assert runner.end() == 0
    assert runner.traces() == []
    assert runner.stderr.read_text() == ""


def test_a_second_signal_does_not_wait_for_tritonserver(runner):
    os.kill(runner.pid_of("tritonserver"), signal.SIGSTOP)  # It can't answer the first one.
    runner.process.send_signal(signal.SIGTERM)
    waiting.wait_until(
        lambda: signals_pending(runner.pid_of("tritonserver")), 10, "the first signal has been passed on"
    )
    runner.process.send_signal(signal.SIGTERM)
    assert runner.end() == 0
    assert runner.traces() == []


def test_a_killed_runner_takes_everything_with_it(runner):
    runner.process.kill()
    runner.end()
    waiting.wait_until(lambda: not runner.traces(), END_TIMEOUT_S, "no trace of the runner is left")


def test_a_killed_tritonserver_is_reported_with_its_log_and_leaves_no_trace(start):
    runner = start("--max-restarts", "0")
    runner.wait_until_ready()
    os.kill(runner.pid_of("tritonserver"), signal.SIGKILL)
    assert runner.end() == 1
    stderr = runner.stderr.read_text()
    assert "\nerror: tritonserver died (signal 9)" in stderr
    assert "Started Metrics Service" in stderr
    assert "Traceback" not in stderr
    assert runner.traces() == []


def test_a_killed_supervisor_takes_tritonserver_with_it_and_leaves_no_trace(start):
    runner = start("--max-restarts", "0")
    runner.wait_until_ready()
    os.kill(runner.supervisor_pid(), signal.SIGKILL)
    assert runner.end() == 1
    waiting.wait_until(lambda: not runner.traces(), END_TIMEOUT_S, "no trace of the runner is left")


@pytest.mark.parametrize("victim", ["tritonserver", "supervisor", "runner", "stub"])
def test_no_job_board_is_left_by_whatever_is_killed(start, tmp_path, victim):
    shutil.copytree(tiny.ROOT / "model_repository" / "jobs", tmp_path / "repository" / "jobs")
    runner = start("--max-restarts", "0")
    assert runner.wait_until_ready().startswith("Ready: ")
    [board] = runner.job_boards()
    pids = {
        "tritonserver": runner.pid_of("tritonserver"),
        "supervisor": runner.supervisor_pid(),
        "runner": runner.process.pid,
        "stub": next(
            pid for pid, line in tiny.processes_of(tmp_path / "repository" / "jobs").items() if "stub" in line
        ),
    }
    os.kill(pids[victim], signal.SIGKILL)
    if victim == "stub":
        runner.process.send_signal(signal.SIGTERM)
    runner.end()
    waiting.wait_until(
        lambda: not board.exists() and not runner.traces(), END_TIMEOUT_S, "no trace of the board is left"
    )


def test_tritonserver_does_not_outlive_runner_and_supervisor(runner):
    supervisor = runner.supervisor_pid()
    runner.process.send_signal(signal.SIGSTOP)  # It can't clean up any more.
    others = runner.pid_of("tritonserver"), runner.pid_of("triton_python_backend_stub")
    os.kill(supervisor, signal.SIGKILL)
    waiting.wait_until(lambda: not is_running(others[0]) and not is_running(others[1]), 10, "both processes have ended")


def test_ctrl_c_while_models_load_ends_the_runner_without_a_trace(start, tmp_path):
    tiny.add_python_model(tmp_path / "repository", "slow", tiny.SLOW_CODE, tiny.DOUBLE_CONFIG)
    runner = start()
    waiting.wait_until(lambda: len(tiny.shared_memory_of(runner.process.pid)) == 2, 20, "both models are loading")
    runner.process.send_signal(signal.SIGINT)
    assert runner.end() == 0
    assert runner.traces() == []


def test_the_one_line_of_output_has_all_addresses(start):
    runner = start()
    line = runner.wait_until_ready()
    address = r"127\.0\.0\.1:\d+"
    assert re.fullmatch(rf"Ready: http://{address} grpc://{address} metrics http://{address}/metrics \(.*\)\n", line)
    runner.process.send_signal(signal.SIGTERM)
    assert runner.process.stdout.read() == ""


def test_verbose_shows_tritons_log(start):
    runner = start("--verbose")
    runner.wait_until_ready()
    runner.process.send_signal(signal.SIGTERM)
    assert runner.end() == 0
    assert "successfully loaded 'double'" in runner.stderr.read_text()


def test_a_server_can_be_started_again_after_its_end_and_keeps_its_last_log(tmp_path):
    tiny.add_double(tmp_path)
    server = EmbeddedServer(tmp_path, ready_timeout_s=60, stop_timeout_s=5)
    with pytest.raises(ServerError, match="start it first"):
        _ = server.pid
    for _ in range(2):
        with server:
            assert server.pid in tiny.processes_of(tmp_path)
            with pytest.raises(ServerError, match="already running"):
                server.start()
        assert tiny.processes_of(tmp_path) == {}
        assert "successfully unloaded 'double'" in server.log_text()


def test_a_port_lost_between_check_and_start_is_picked_anew(tmp_path, monkeypatch):
    tiny.add_double(tmp_path)
    server = EmbeddedServer(tmp_path, ready_timeout_s=60, stop_timeout_s=5)
    choose = server._choose_listeners
    attempts = []

    def choose_badly_once():
        attempts.append(choose() if attempts else tuple(listener_on_a_taken_port(entry, taken) for entry in choose()))
        return attempts[-1]

    with waiting.taken_port() as taken:
        monkeypatch.setattr(server, "_choose_listeners", choose_badly_once)
        with server:
            assert len(attempts) == 2


def listener_on_a_taken_port(listener, taken):
    return type(listener)(
        listener.option, listener.address, taken if listener.option == "--http-port" else listener.port
    )


def test_the_response_cache_is_found(tmp_path):
    config = f"{tiny.DOUBLE_CONFIG}response_cache {{ enable: true }}\n"
    tiny.add_double(tmp_path, config=config)
    arguments = ("--cache-config", "local,size=1048576")
    with EmbeddedServer(tmp_path, ready_timeout_s=60, stop_timeout_s=5, extra_arguments=arguments) as server:
        assert "successfully loaded 'double'" in server.log_text()
    assert find_installation().cache_directory.is_dir()


def signals_pending(pid: int) -> bool:
    """Whether a process has a signal waiting that it hasn't handled."""
    status = Path(f"/proc/{pid}/status").read_text()
    return any(int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd")))
