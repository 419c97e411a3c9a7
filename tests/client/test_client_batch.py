"""`audioldm2 --prompts`: many prompts, restarts in the middle, and what is on the disk afterwards."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from audioldm2_client import (
    ModelNotFoundError,
    RequestCancelledError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
)
from audioldm2_client._cli.batch import Outage, ServerGoneError, may_pass, run_batch
from audioldm2_client._cli.main import main
from audioldm2_client._cli.prompts_file import read_prompts

from server import EmbeddedServer
from tests.helpers.waiting import wait_until


@pytest.fixture
def protocol() -> str:
    """One of them is enough, except where signals end what waits: the command line itself knows no protocol."""
    return "grpc"


def command(url: str, prompts: Path, folder: Path, *more: str) -> list[str]:
    options = ["--prompts", str(prompts), "--output-dir", str(folder), "--url", url, *more]
    return [sys.executable, "-W", "error", "-m", "audioldm2_client", *options]


def run(url: str, prompts: Path, folder: Path, *more: str) -> int:
    return main(command(url, prompts, folder, *more)[5:])


def records(folder: Path) -> list[dict]:
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def check_all_there(folder: Path, count: int) -> None:
    """As many results as there should be: each with its own seed and name, whole, and nothing else in the folder."""
    found = records(folder)
    assert sorted(record["seed"] for record in found) == list(range(count))
    assert len({record["name"] for record in found}) == count
    names = {record["files"][0] for record in found}
    assert {path.name for path in folder.iterdir()} == names | {"results.jsonl"}
    for record in found:
        samples, rate = soundfile.read(folder / record["files"][0])
        assert (len(samples), rate) == (int(16000 * length_s(record["seed"])), 16000)
        assert abs(samples).max() > 0.4


def length_s(number: int) -> float:
    """A length that tells which prompt it is, and that FP32 holds exactly."""
    return (64 + number) / 1024


def numbered(count: int) -> list[dict]:
    """Prompts whose audio tells which one it is."""
    return [
        {"prompt": f"sound {n}", "seed": n, "audio_length_in_s": length_s(n), "num_inference_steps": 2}
        for n in range(count)
    ]


@pytest.fixture
def fixed_ports(toy_repository: Path) -> Iterator[dict]:
    """Arguments for a server that can be started again at the same place."""
    with socket.create_server(("127.0.0.1", 0)) as http, socket.create_server(("127.0.0.1", 0)) as grpc:
        ports = {"http_port": http.getsockname()[1], "grpc_port": grpc.getsockname()[1]}
    return {"model_repository": toy_repository, **ports}


@pytest.mark.parametrize(("protocol", "how"), [("grpc", "killed"), ("http", "stopped")])
@pytest.mark.server
def test_200_prompts_outlive_a_restart_of_the_server(fixed_ports, protocol, how, tmp_path):
    prompts, folder = write_lines(tmp_path / "prompts.jsonl", numbered(200)), tmp_path / "out"
    url = f"{protocol}://127.0.0.1:{fixed_ports[f'{protocol}_port']}"
    first = EmbeddedServer(**fixed_ports).start()
    client = subprocess.Popen(
        command(url, prompts, folder, "--concurrency", "8", "--retry-for", "60", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: len(records(folder)) >= 60, 60, "some results")
        if how == "killed":
            os.kill(first.pid, signal.SIGKILL)
        first.stop()
        assert len(records(folder)) < 200
        with EmbeddedServer(**fixed_ports):
            out, err = client.communicate(timeout=120)
    finally:
        first.stop()
        client.kill()
        client.wait()
    assert (client.returncode, err) == (0, "")
    check_all_there(folder, 200)
    assert [json.loads(line) for line in out.splitlines()] == records(folder)


def test_run_that_was_killed_is_continued(url, tmp_path):
    prompts, folder = write_lines(tmp_path / "prompts.jsonl", numbered(60)), tmp_path / "out"
    with subprocess.Popen(command(url, prompts, folder), stdout=subprocess.DEVNULL) as killed:
        wait_until(lambda: len(records(folder)) >= 20, 60, "some results")
        killed.kill()
    before = records(folder)
    assert 20 <= len(before) < 60
    times = {record["name"]: (folder / record["files"][0]).stat().st_mtime_ns for record in before}
    (folder / ".x.wav.0123abcd.part").write_bytes(b"half")
    with (folder / "results.jsonl").open("a") as torn:
        torn.write('{"name": "sou')
    done = subprocess.run(command(url, prompts, folder), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{60 - len(before)} made, {len(before)} already there, 0 failed\n")
    assert times == {name: (folder / f"{name}.wav").stat().st_mtime_ns for name in times}
    lines = (folder / "results.jsonl").read_text().splitlines()
    lines.remove('{"name": "sou')
    write_lines(folder / "results.jsonl", lines)
    check_all_there(folder, 60)


def test_second_run_sends_nothing(url, tmp_path, capsys):
    prompts, folder = write_lines(tmp_path / "p.txt", ["a dog", "", "a cat", "a dog"]), tmp_path / "out"
    assert run(url, prompts, folder) == 0
    assert "3 made, 0 already there, 0 failed" in capsys.readouterr().out
    assert run("127.0.0.1:1", prompts, folder, "--retry-for", "0") == 0
    assert "0 made, 3 already there, 0 failed" in capsys.readouterr().out
    assert len({record["name"] for record in records(folder)}) == 3


def test_changed_options_and_missing_files_are_made_again(url, tmp_path):
    prompts, folder = (
        write_lines(tmp_path / "p.jsonl", [{"prompt": "a dog", "name": "dog", "seed": 1}]),
        tmp_path / "out",
    )
    assert run(url, prompts, folder) == 0
    write_lines(prompts, [{"prompt": "a dog", "name": "dog", "seed": 2}])
    assert run(url, prompts, folder) == 0
    assert [record["seed"] for record in records(folder)] == [1, 2]
    (folder / "dog.wav").unlink()
    assert run(url, prompts, folder) == 0
    assert (folder / "dog.wav").exists()
    assert run(url, prompts, folder, "--format", "flac") == 0
    assert (folder / "dog.flac").exists()


def test_options_of_the_line_go_before_those_of_the_command(url, tmp_path):
    lines = ["a dog", {"prompt": "a cat", "seed": 8, "num_waveforms_per_prompt": 2}, {"prompt": "a cow", "seed": None}]
    prompts, folder = write_lines(tmp_path / "p", lines), tmp_path / "out"
    assert run(url, prompts, folder, "--seed", "7", "--length", "0.5", "--concurrency", "1") == 0
    found = records(folder)
    assert [(record["prompt"], record["seed"], len(record["files"])) for record in found] == [
        ("a dog", 7, 1),
        ("a cat", 8, 2),
        ("a cow", 7, 1),
    ]
    assert found[1]["clap_scores"] == [0.9, 0.1]
    assert found[0]["clap_scores"] == [None]
    assert all((folder / file).exists() for record in found for file in record["files"])


def test_bad_prompts_fail_alone_and_the_first_decides_the_status(url, tmp_path, capsys):
    lines = ["a dog", "fail CANCELLED [DEADLINE] too late", "fail INVALID_ARG [INVALID_ARG] no", "a cat"]
    prompts, folder = write_lines(tmp_path / "p.txt", lines), tmp_path / "out"
    assert run(url, prompts, folder) == 4
    captured = capsys.readouterr()
    assert sorted(captured.err.splitlines()) == [
        "audioldm2: line 2: [DEADLINE] too late",
        "audioldm2: line 3: [INVALID_ARG] no",
    ]
    assert captured.out.endswith("2 made, 0 already there, 2 failed\n")


def test_server_that_stays_away_is_given_up_and_told(tmp_path, capsys):
    prompts = write_lines(tmp_path / "p.txt", ["a dog", "a cat"])
    assert run("127.0.0.1:1", prompts, tmp_path / "out", "--retry-for", "0.5") == 3
    err = capsys.readouterr().err
    assert "can't reach a Triton server" in err
    assert "gave up after 0.5 s; run the same command again to continue" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_interrupt_cancels_all_on_the_server_and_the_rest_can_be_continued(url, tmp_path, ask):
    lines = [{"prompt": f"sound {n}", "num_inference_steps": 1000} for n in range(5)]
    prompts, folder = write_lines(tmp_path / "p.jsonl", lines), tmp_path / "out"
    script = (
        "import sys\n"
        "from audioldm2_client import AsyncAudioLDM2Client\n"
        "from audioldm2_client._cli.main import main\n"
        "submit = AsyncAudioLDM2Client.submit\n"
        "def announcing(*a, **o):\n"
        "    generation = submit(*a, **o)\n"
        "    print(generation.id, flush=True)\n"
        "    return generation\n"
        "AsyncAudioLDM2Client.submit = announcing\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = command(url, prompts, folder)[5:]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            ids = [process.stdout.readline().strip() for _ in range(4)]
            wait_until(lambda: all(ask(i).state in ("queued", "denoising") for i in ids), 20, "all have arrived")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "audioldm2: interrupted; run the same command again to continue\n")
    for request_id in ids:
        wait_until(lambda i=request_id: ask(i).state == "cancelled", 20, "the server has stopped it")
    assert [path.name for path in folder.iterdir()] == ["results.jsonl"]


def test_folder_belongs_to_one_run_at_a_time(url, tmp_path, waiting, capsys):
    prompts, folder = write_lines(tmp_path / "p.txt", [f"wait {waiting}"]), tmp_path / "out"
    with subprocess.Popen(command(url, prompts, folder), stdout=subprocess.DEVNULL) as first:
        wait_until(waiting.exists, 20, "the first one runs")
        assert run(url, prompts, folder) == 2
        assert "another process is writing to" in capsys.readouterr().err
        waiting.unlink()
        assert first.wait(20) == 0


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "holds no prompts"),
        (["ok", '{"prompt": '], "line 2: it begins with a brace and isn't JSON"),
        ([{"seed": 1}], "line 1: prompt must be a text"),
        ([{"prompt": "x", "steps": 3}], "line 1: 'steps' must be one of prompt, name, negative_prompt, audio_le"),
        ([{"prompt": "x", "seed": "7"}], "line 1: seed must be an int"),
        ([{"prompt": "x", "seed": 2**63}], "line 1: seed must fit in a 64-bit signed integer"),
        ([{"prompt": "x", "name": "../../etc/x"}], "line 1: name must have 1 to 100 of the characters"),
        ([{"prompt": "x", "name": ".x"}], "line 1: name must have"),
        ([{"prompt": "x", "name": "a"}, {"prompt": "y", "name": "A"}], r"line 2: the name 'A' is also that of line 1"),
        (
            [{"prompt": "x", "name": "a-2"}, {"prompt": "y", "name": "a", "num_waveforms_per_prompt": 2}],
            "line 2: the name 'a-2' is also that of line 1",
        ),
    ],
)
def test_mistake_in_the_file_is_named_before_anything_is_sent(tmp_path, capsys, lines, sentence):
    prompts = write_lines(tmp_path / "p.txt", lines)
    assert run("127.0.0.1:1", prompts, tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_bad_usage_is_status_2(tmp_path, capsys):
    prompts = write_lines(tmp_path / "p.txt", ["a dog"])
    assert run("127.0.0.1:1", tmp_path / "nosuch", tmp_path / "out") == 2
    assert run("127.0.0.1:1", prompts, prompts) == 2
    assert run("127.0.0.1:1", prompts, tmp_path / "out", "--concurrency", "0") == 2
    assert run("127.0.0.1:1", prompts, tmp_path / "out", "--retry-for=-1") == 2
    (tmp_path / "latin1").write_bytes("für".encode("latin-1"))
    assert run("127.0.0.1:1", tmp_path / "latin1", tmp_path / "out") == 2
    assert "must be UTF-8" in capsys.readouterr().err


def test_names_come_from_the_prompt_and_stay_when_lines_are_added(tmp_path):
    def names(*lines: object) -> list[str]:
        return [item.name for item in read_prompts(write_lines(tmp_path / "p", list(lines)), {}, "audioldm2")]

    (dog,) = names("A dog, barking!")
    assert dog.startswith("a-dog-barking-")
    assert names("a cat", "A dog, barking!")[1] == dog
    assert len(set(names("x", "x", "x"))) == 3
    assert names("犬の鳴き声")[0].startswith("prompt-")
    assert len(names("word " * 100)[0]) < 60
    assert names({"prompt": "x", "name": "my.name_1"}) == ["my.name_1"]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ServerBusyError("busy"), True),
        (ServerUnreachableError("lost"), True),
        (ServerUnreachableError("certificate verify failed", misconfigured=True), False),
        (ModelNotFoundError("Request for unknown model: 'a' has no available versions"), True),
        (ModelNotFoundError("Request for unknown model: 'a' is not found"), False),
        (RequestCancelledError("CANCELLED"), True),
        (RequestCancelledError("[CANCELLED] The client gave up."), False),
        (ServerFaultError("boom"), False),
    ],
)
def test_what_passes_is_what_a_restart_causes(error, passes):
    assert may_pass(error) is passes


def test_outage_begins_with_the_first_failure_and_ends_with_any_answer():
    now = [0.0]
    outage = Outage(10, lambda: now[0])
    assert not outage.is_too_long()
    now[0] = 9
    assert not outage.is_too_long()
    outage.answered()
    now[0] = 15
    assert not outage.is_too_long()
    now[0] = 25
    assert outage.is_too_long()


def test_full_disk_ends_the_batch(tmp_path):
    class Generator:
        async def generate(self, prompt, **_):
            return prompt

    def fill(*_):
        raise OSError("no space left on device")

    items = read_prompts(write_lines(tmp_path / "p", ["a", "b"]), {}, "audioldm2")
    with pytest.raises(OSError, match="no space"):
        asyncio.run(run_batch(Generator(), items, concurrency=2, retry_for_s=0, on_result=fill, on_failure=fill))


def test_outage_of_one_ends_all(tmp_path):
    class Gone:
        async def generate(self, prompt, **_):
            if prompt == "a":
                raise ServerUnreachableError("refused", safe_to_retry=True)
            await asyncio.sleep(60)

    items = read_prompts(write_lines(tmp_path / "p", ["a", "b"]), {}, "audioldm2")
    with pytest.raises(ServerGoneError):
        asyncio.run(run_batch(Gone(), items, concurrency=2, retry_for_s=0, on_result=print, on_failure=print))
