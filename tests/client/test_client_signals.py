"""The command line ends on signals as on Ctrl-C, and the library's hook closes a client: real processes and signals."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from audioldm2_client import AudioLDM2Client

from tests.helpers.terminal import Terminal
from tests.helpers.waiting import wait_until

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}
COMMAND = (sys.executable, "-W", "error", "-m", "audioldm2_client")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts processes; none of them outlives the test."""
    started: list[subprocess.Popen] = []

    def start(*command: str, **settings) -> subprocess.Popen:
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings}
        started.append(subprocess.Popen(command, **settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def has_signal(process: subprocess.Popen, field: str, number: int) -> bool:
    """Whether a process catches (SigCgt) or ignores (SigIgn) a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(rf"{field}:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


@contextlib.contextmanager
def silent_server() -> Iterator[socket.socket]:
    """Listens, and says nothing; what connects is accepted by the test."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        yield listener


def one(url: str, output: Path, request_id: str, *more: str) -> tuple[str, ...]:
    """The command for one long generation."""
    options = ("-o", str(output), "--url", url, "--steps", "1000", "--request-id", request_id)
    return (*COMMAND, "a dog", *options, *more)


@pytest.mark.parametrize("number", WORDS)
def test_signal_cancels_on_the_server_and_leaves_nothing(url, start, ask, tmp_path, number):
    request_id = f"{tmp_path}"[-60:]
    process = start(*one(url, tmp_path / "x.wav", request_id))
    wait_until(lambda: ask(request_id).state == "denoising", 20, "denoising begins")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (128 + number, "", f"audioldm2: {WORDS[number]}\n")
    wait_until(lambda: ask(request_id).state == "cancelled", 20, "the server has stopped it")
    assert not list(tmp_path.iterdir())


def test_timeout_of_the_shell_cancels_on_the_server(toy_server, start, ask, tmp_path):
    """`timeout` sends SIGTERM, as `docker stop` and Kubernetes do."""
    process = start("timeout", "--preserve-status", "3", *one(toy_server.grpc_url, tmp_path / "x.wav", "of-timeout"))
    wait_until(lambda: ask("of-timeout").state == "denoising", 20, "denoising begins")
    assert process.wait(20) == 143
    wait_until(lambda: ask("of-timeout").state == "cancelled", 20, "the server has stopped it")


def test_terminal_that_is_closed_cancels_on_the_server(toy_server, ask, tmp_path):
    terminal = Terminal(*one(toy_server.grpc_url, tmp_path / "x.wav", "of-terminal"))
    terminal.read_until("denoising")
    assert terminal.hang_up() == 129
    wait_until(lambda: ask("of-terminal").state == "cancelled", 20, "the server has stopped it")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gone", ["stdout", "stderr"])
def test_pipe_that_is_closed_changes_no_exit_status(toy_server, start, ask, tmp_path, gone):
    process = start(*one(toy_server.grpc_url, tmp_path / "x.wav", f"without-{gone}", "--json"))
    getattr(process, gone).close()
    setattr(process, gone, None)
    wait_until(lambda: ask(f"without-{gone}").state == "denoising", 20, "denoising begins")
    process.terminate()
    assert process.wait(20) == 143
    wait_until(lambda: ask(f"without-{gone}").state == "cancelled", 20, "the server has stopped it")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_outputs_that_are_closed_from_the_start_change_no_exit_status(toy_server, start, ask, tmp_path, closed):
    request_id = f"closed {closed}"
    command = one(toy_server.grpc_url, tmp_path / "x.wav", request_id)
    process = start("sh", "-c", f'exec "$@" {closed}', "sh", *command)
    wait_until(lambda: ask(request_id).state == "denoising", 20, "denoising begins")
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (143, "", "" if "2" in closed else "audioldm2: ended by SIGTERM\n")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_signal_ends_what_waits_for_a_silent_server(start, tmp_path, scheme):
    with silent_server() as server:
        process = start(*one(f"{scheme}://127.0.0.1:{server.getsockname()[1]}", tmp_path / "x.wav", "unheard"))
        with server.accept()[0]:
            process.terminate()
            _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (143, "audioldm2: ended by SIGTERM\n")


PATIENT = """
import sys
from audioldm2_client import _flow
from audioldm2_client._cli.main import main
_flow.CANCEL_WINDOW_S = 120
sys.exit(main(sys.argv[1:]))
"""


def test_second_signal_ends_at_once(start, tmp_path):
    """While a silent server is told to stop, here for two minutes."""
    with silent_server() as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        process = start(sys.executable, "-c", PATIENT, "a dog", "-o", str(tmp_path / "x.wav"), "--url", url)
        with server.accept()[0]:
            process.terminate()
            with server.accept()[0]:  # it is being told
                process.terminate()
                assert process.wait(20) == -signal.SIGTERM  # a shell says 143


def test_signal_that_is_ignored_stays_so(toy_server, start, ask, tmp_path):
    """As under nohup: the terminal may close, and the generation goes on."""
    command = [*one(toy_server.grpc_url, tmp_path / "x.wav", "under-nohup")]
    command[command.index("1000")] = "60"
    process = start("sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command)
    wait_until(lambda: ask("under-nohup").state == "denoising", 20, "denoising begins")
    assert has_signal(process, "SigIgn", signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 0
    assert (tmp_path / "x.wav").exists()


WRITING = """
import os, signal, sys
import soundfile
from audioldm2_client._cli.main import main
write = soundfile.write
def interrupted(*arguments, **options):
    write(*arguments, **options)
    os.kill(os.getpid(), signal.SIGTERM)
soundfile.write = interrupted
sys.exit(main(sys.argv[1:]))
"""


def test_signal_while_a_file_is_written_leaves_no_part_of_it(toy_server, start, tmp_path):
    options = ("--url", toy_server.grpc_url, "--candidates", "3")
    process = start(sys.executable, "-c", WRITING, "a dog", "-o", str(tmp_path / "x.wav"), *options)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "audioldm2: ended by SIGTERM\n")
    assert not list(tmp_path.iterdir())


def batch(url: str, tmp_path: Path, *lines: dict) -> tuple[str, ...]:
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    options = ("--prompts", str(tmp_path / "p.jsonl"), "--output-dir", str(tmp_path / "out"), "--url", url)
    return (*COMMAND, *options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_a_batch_which_can_be_continued(url, start, ask, tmp_path, number):
    ids = [f"{tmp_path}"[-60:] + str(n) for n in range(3)]
    short = {"prompt": "a cat", "name": "cat"}  # which the toy server makes at once, whatever else runs
    long = [{"prompt": f"dog {n}", "num_inference_steps": 1000, "request_id": ids[n]} for n in range(3)]
    command = batch(url, tmp_path, short, *long)
    process = start(*command)
    wait_until(lambda: (tmp_path / "out/cat.wav").exists(), 20, "one is done")
    wait_until(lambda: all(ask(i).state in ("queued", "denoising") for i in ids), 20, "the others run")
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    words = f"audioldm2: {WORDS[number]}; run the same command again to continue\n"
    assert (process.returncode, err) == (128 + number, words)
    for request_id in ids:
        wait_until(lambda i=request_id: ask(i).state == "cancelled", 20, "the server has stopped it")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cat.wav", "results.jsonl"]
    for line in long:
        line["num_inference_steps"] = 1
        del line["request_id"]
    again = start(*batch(url, tmp_path, short, *long))
    assert again.communicate(timeout=30)[0].endswith("3 made, 1 already there, 0 failed\n")


def test_signal_while_a_batch_waits_for_the_server_ends_it(start, tmp_path):
    process = start(*batch("127.0.0.1:1", tmp_path, {"prompt": "a dog"}), "--retry-for", "300")
    wait_until(lambda: (tmp_path / "out/results.jsonl").exists(), 20, "it has begun")
    process.terminate()
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (143, "audioldm2: ended by SIGTERM; run the same command again to continue\n")


def test_handlers_of_a_program_that_calls_the_command_are_back_afterwards(toy_server, tmp_path):
    from audioldm2_client._cli.main import main

    before = [signal.getsignal(number) for number in WORDS]
    assert main(["a dog", "-o", str(tmp_path / "x.wav"), "--url", toy_server.grpc_url]) == 0
    assert [signal.getsignal(number) for number in WORDS] == before


POOL = """
import concurrent.futures, signal, sys
from audioldm2_client import AudioLDM2Client, RequestCancelledError
{before}
ends = []
def generate(request_id):
    try:
        client.generate("a dog", num_inference_steps=1000, request_id=request_id)
    except (RequestCancelledError, RuntimeError) as error:
        ends.append(type(error).__name__)
try:
    with (
        concurrent.futures.ThreadPoolExecutor(2) as pool,
        AudioLDM2Client(sys.argv[1]) as client,
        client.close_on_signals(),
    ):
        list(pool.map(generate, sys.argv[2:]))
except BaseException as error:
    print(repr(error), flush=True)
    raise
finally:
    print(sorted(ends), flush=True)
"""

ASYNC = """
import asyncio, signal, sys
from audioldm2_client import AsyncAudioLDM2Client
{before}
async def main():
    async with AsyncAudioLDM2Client(sys.argv[1]) as client, client.close_on_signals():
        async with asyncio.TaskGroup() as group:
            for request_id in sys.argv[2:]:
                group.create_task(client.generate("a dog", num_inference_steps=1000, request_id=request_id))
try:
    asyncio.run(main())
except BaseException as error:
    print(repr(error), flush=True)
    raise
"""
OWN_HANDLER = "signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))"


@pytest.mark.parametrize("script", [POOL, ASYNC])
@pytest.mark.parametrize(
    ("number", "before", "status", "said"),
    [
        (signal.SIGTERM, "", 143, "SystemExit(143)"),
        (signal.SIGINT, "", -signal.SIGINT, "KeyboardInterrupt()"),
        (signal.SIGTERM, OWN_HANDLER, None, "mine"),
    ],
)
def test_hook_closes_the_client_and_then_the_signal_does_what_it_did(
    url, start, ask, tmp_path, script, number, before, status, said
):
    ids = [f"{tmp_path}"[-60:] + str(n) for n in range(2)]
    process = start(sys.executable, "-W", "error", "-c", script.format(before=before), url, *ids)
    wait_until(lambda: all(ask(i).state == "denoising" for i in ids), 20, "denoising begins")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert said in out
    assert status is None or process.returncode == status
    if script is POOL:
        assert "'RequestCancelledError', 'RequestCancelledError'" in out
    for request_id in ids:
        wait_until(lambda i=request_id: ask(i).state == "cancelled", 20, "the server has stopped it")


def test_hook_restores_handlers_and_leaves_alone_what_is_ignored():
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with AudioLDM2Client() as client:
            with client.close_on_signals([signal.SIGTERM, signal.SIGHUP]):
                assert signal.getsignal(signal.SIGTERM) is not mine
                assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is mine
            os.kill(os.getpid(), signal.SIGTERM)
            assert client.cancel_all() == 0  # it is open
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_library_installs_no_handlers_by_itself(toy_server):
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    with AudioLDM2Client(toy_server.grpc_url) as client:
        client.generate("a dog")
        assert [signal.getsignal(number) for number in signal.valid_signals()] == before
