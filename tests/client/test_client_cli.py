"""The command `audioldm2`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import audioldm2_client
import pytest
import soundfile
from audioldm2_client._cli.main import main


@pytest.fixture
def protocol() -> str:
    """One of them is enough, except where signals end what waits: the command line itself knows no protocol."""
    return "grpc"


def run(url: str, prompt: str, output: Path, *more: str) -> int:
    return main([prompt, "-o", str(output), "--url", url, *more])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_file_is_written_and_described(url, tmp_path, capsys):
    output = tmp_path / "dog.wav"
    assert run(url, "a dog barking", output, "--length", "0.5", "--seed", "7") == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == f"{output}: 0.50 s at 16000 Hz"
    assert second.startswith("seed 7, generated in ")
    assert err == ""
    assert soundfile.info(output).frames == 8000


def test_candidates_become_numbered_files_best_first(url, tmp_path, capsys):
    assert run(url, "a dog", tmp_path / "dog.flac", "--candidates", "3") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dog-1.flac", "dog-2.flac", "dog-3.flac"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines[:3]] == ["0.900", "0.500", "0.100"]
    assert "dog-1.flac: 1.00 s at 16000 Hz, CLAP score" in lines[0]


def test_every_option_reaches_the_server(url, tmp_path, capsys):
    options = (
        "--negative-prompt=noise --steps=25 --guidance-scale=2.5 --length=5 --candidates=2 --seed=-1 "
        "--guidance-start=0.25 --guidance-end=0.75 --scheduler=DDIMScheduler --eta=0.5 --timeout=9 "
        "--model=toy_generator"
    )
    assert run(url, "echo", tmp_path / "x.wav", *options.split()) == 2
    err = capsys.readouterr().err
    for arrived in (
        '"negative_prompt": ["noise"]',
        '"num_inference_steps": [25]',
        '"guidance_scale": [2.5]',
        '"guidance_start": [0.25]',
        '"guidance_end": [0.75]',
        '"audio_length_in_s": [5.0]',
        '"num_waveforms_per_prompt": [2]',
        '"seed": [-1]',
        '"scheduler": ["DDIMScheduler"]',
        '"eta": [0.5]',
        '"timeout_us": 9000000',
    ):
        assert arrived in err


@pytest.mark.parametrize(
    ("prompt", "status", "sentence"),
    [
        ("fail INVALID_ARG [INVALID_ARG] prompt must not be blank", 2, "[INVALID_ARG] prompt must not be blank"),
        ("fail UNAVAILABLE queue is full", 3, "queue is full"),
        ("fail CANCELLED [DEADLINE] too late", 4, "[DEADLINE] too late"),
        ("fail CANCELLED [CANCELLED] gone", 1, "[CANCELLED] gone"),
    ],
)
def test_failure_is_one_sentence_and_its_status(url, tmp_path, capsys, prompt, status, sentence):
    assert run(url, prompt, tmp_path / "x.wav") == status
    assert capsys.readouterr() == ("", f"audioldm2: {sentence}\n")
    assert not list(tmp_path.iterdir())


def test_traceback_of_the_server_is_left_to_its_log(url, tmp_path, capsys):
    assert run(url, "raise boom", tmp_path / "x.wav") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ValueError: boom" in err


def test_passed_timeout_is_status_4(url, tmp_path, waiting, capsys):
    assert run(url, f"wait {waiting}", tmp_path / "x.wav", "--timeout", "0.3") == 4
    assert "within 0.3 s" in capsys.readouterr().err


def test_unreachable_server_is_status_3(tmp_path, capsys):
    assert run("127.0.0.1:1", "x", tmp_path / "x.wav") == 3
    assert "127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-o", "x.mp3"], "must end in .wav or .flac"),
        (["-o", "nosuch/x.wav"], "folder 'nosuch' doesn't exist"),
        (["-o", "x.wav", "--timeout", "0"], "timeout_s must be a positive number"),
        (["-o", "x.wav", "--url", "ftp://x:1"], "url must start with"),
    ],
)
def test_bad_usage_is_found_before_anything_is_sent(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUDIOLDM2_URL", "127.0.0.1:1")  # would be status 3
    assert main(["x", *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["x"], ["x", "-o", "x.wav", "--steps", "many"], ["x", "-o", "a.wav", "--se=1"]]
)
def test_argparse_refuses_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: audioldm2" in capsys.readouterr().err


def test_url_comes_from_the_environment(url, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOLDM2_URL", url)
    assert main(["x", "-o", str(tmp_path / "x.wav")]) == 0


def test_write_that_fails_after_the_generation_is_status_1(url, tmp_path, monkeypatch, capsys):
    def fill_the_disk(*_: object, **__: object) -> None:
        raise soundfile.LibsndfileError(1, "no space: ")

    monkeypatch.setattr(soundfile, "write", fill_the_disk)
    assert run(url, "x", tmp_path / "x.wav") == 1
    assert "can't write" in capsys.readouterr().err


def test_module_and_console_script_are_the_same_command():
    script = Path(sys.executable).with_name("audioldm2")
    for command in ([sys.executable, "-m", "audioldm2_client"], [str(script)]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout == f"audioldm2 {audioldm2_client.__version__}\n"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_interrupt_ends_with_130_and_one_line(url, tmp_path, waiting):
    command = [sys.executable, "-m", "audioldm2_client", f"wait {waiting}", "-o", str(tmp_path / "x.wav")]
    process = subprocess.Popen(
        [*command, "--url", url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        deadline = time.monotonic() + 20
        while not waiting.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "audioldm2: interrupted\n")
