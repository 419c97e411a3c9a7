"""The command `audioldm2` on a terminal, and its outputs beside audio files."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audioldm2_client import AudioLDM2Client, _spectrogram
from audioldm2_client._cli.main import main
from audioldm2_client._cli.options import make_parser
from audioldm2_client._cli.progress_bar import GenerationBar
from audioldm2_client._server_options import client_settings
from PIL import Image

from tests.helpers.terminal import Terminal
from tests.helpers.waiting import wait_until

ANNOUNCING = """
import sys
from audioldm2_client import AudioLDM2Client
from audioldm2_client._cli.main import main
submit = AudioLDM2Client.submit
def announcing(*arguments, **options):
    generation = submit(*arguments, **options)
    print("id", generation.id, flush=True)
    return generation
AudioLDM2Client.submit = announcing
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def protocol() -> str:
    """One of them is enough, except where signals end what waits: the command line itself knows no protocol."""
    return "grpc"


@pytest.fixture
def occupied(url):
    """A server that is busy, so that a request has to queue."""
    with AudioLDM2Client(url) as client:
        running = [client.submit("busy", num_inference_steps=60) for _ in range(2)]
        wait_until(lambda: all(g.progress().state == "denoising" for g in running), 20, "the slots are taken")
        yield


@pytest.mark.usefixtures("occupied")
def test_terminal_shows_queueing_steps_and_decoding(url, tmp_path):
    output = tmp_path / "x.wav"
    terminal = Terminal(
        *(sys.executable, "-m", "audioldm2_client", "a dog", "-o", str(output)),
        *("--url", url, "--steps", "50"),
    )
    assert terminal.wait() == 0
    for words in ("queued", "denoising", "/50 steps", "generated in"):
        assert words in terminal.text
    assert output.exists()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ctrl_c_on_a_terminal_cancels_on_the_server(url, tmp_path, ask):
    terminal = Terminal(
        *(sys.executable, "-c", ANNOUNCING, "a dog", "-o", str(tmp_path / "x.wav")),
        *("--url", url, "--steps", "1000"),
    )
    try:
        terminal.read_until("denoising")
        request_id = terminal.text.partition("id ")[2].split()[0]
        assert ask(request_id).state == "denoising"
        terminal.press_ctrl_c()
        assert terminal.wait() == 130
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise
    assert terminal.text.rstrip().endswith("audioldm2: interrupted")
    assert "Traceback" not in terminal.text
    wait_until(lambda: ask(request_id).state == "cancelled", 20, "the server has stopped it")
    assert not list(tmp_path.iterdir())


def test_batch_on_a_terminal_counts_prompts_and_prints_each_result(url, tmp_path):
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    terminal = Terminal(
        *(sys.executable, "-m", "audioldm2_client", "--prompts", str(tmp_path / "p.txt")),
        *("--output-dir", str(tmp_path / "out"), "--url", url),
    )
    assert terminal.wait() == 0
    assert "/2 prompts" in terminal.text
    assert terminal.text.count("1.00 s at 16000 Hz") == 2
    assert "2 made, 0 already there, 0 failed" in terminal.text


def test_no_bar_where_nobody_sees_it_or_wants_it(url, tmp_path):
    arguments = ("-m", "audioldm2_client", "a dog", "-o", str(tmp_path / "x.wav"), "--url", url, "--steps=20")
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    terminal = Terminal(sys.executable, *arguments, "--no-progress")
    assert terminal.wait() == 0
    assert "denoising" not in terminal.text


def test_bar_needs_no_terminal_to_be_silent():
    with GenerationBar(shown=False) as bar:
        bar(None)  # type: ignore[arg-type]


def test_json_is_one_line_with_everything(url, tmp_path, capsys):
    output = tmp_path / "dog.flac"
    assert main(["größer 犬", "-o", str(output), "--url", url, "--seed", "7", "--candidates", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    result = json.loads(out)
    assert result.pop("elapsed_s") >= 0
    assert len(result.pop("request_id")) == 32
    assert result == {
        "prompt": "größer 犬",
        "files": [str(tmp_path / "dog-1.flac"), str(tmp_path / "dog-2.flac")],
        "seed": 7,
        "sampling_rate": 16000,
        "audio_length_in_s": 1.0,
        "clap_scores": [0.9, 0.1],
        "truncated_tokens": 0,
    }


def test_spectrogram_shows_the_tone_at_its_frequency(tmp_path):
    time_s = np.arange(16000) / 16000
    _spectrogram.write(tmp_path / "tone.png", np.sin(2 * np.pi * 6000 * time_s).astype(np.float32))
    pixels = np.asarray(Image.open(tmp_path / "tone.png").convert("L"), dtype=float)
    loudest = pixels.mean(axis=1).argmax()
    assert abs(1 - loudest / (len(pixels) - 1) - 6000 / 8000) < 0.02
    for samples in (1, 100, 160 * 16000):
        _spectrogram.write(tmp_path / "other.png", np.zeros(samples, np.float32))
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_command_writes_the_spectrogram_of_the_best(url, tmp_path):
    picture = tmp_path / "dog.png"
    options = ["--url", url, "--candidates", "2", "--spectrogram", str(picture)]
    assert main(["a dog", "-o", str(tmp_path / "dog.wav"), *options]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_spectrogram_without_pillow_says_what_to_install_before_anything_is_sent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_spectrogram, "find_spec", lambda _: None)
    options = ["--url", "127.0.0.1:1", "--spectrogram", str(tmp_path / "x.png")]
    assert main(["a dog", "-o", str(tmp_path / "x.wav"), *options]) == 2
    assert "pip install 'audioldm2-client[spectrogram]'" in capsys.readouterr().err


def install_player(folder: Path, name: str, status: int = 0) -> Path:
    """A player that notes what it is to play."""
    folder.mkdir(exist_ok=True)
    player = folder / name
    player.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{folder}/played"\nexit {status}\n')
    player.chmod(player.stat().st_mode | stat.S_IXUSR)
    return folder / "played"


@pytest.mark.parametrize(("player", "ending"), [("aplay", "wav"), ("paplay", "wav"), ("ffplay", "flac")])
def test_play_hands_the_file_to_a_player_without_a_shell(url, tmp_path, monkeypatch, player, ending):
    played = install_player(tmp_path / "bin", player)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    name = f"a $(touch x) 'dog'.{ending}"
    assert main(["a dog", "-o", str(tmp_path / name), "--url", url, "--play"]) == 0
    assert played.read_text().splitlines()[-1] == str(tmp_path / name)


def test_play_without_a_player_or_with_a_broken_one(url, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    arguments = ["a dog", "-o", str(tmp_path / "x.flac"), "--url", url, "--play"]
    install_player(tmp_path / "bin", "aplay")  # which can't play FLAC
    assert main(arguments) == 2
    assert "needs one of the commands paplay, ffplay, afplay" in capsys.readouterr().err
    assert not (tmp_path / "x.flac").exists()
    install_player(tmp_path / "bin", "paplay", status=3)
    assert main(arguments) == 1
    assert "can't play" in capsys.readouterr().err
    assert soundfile.info(tmp_path / "x.flac").frames == 16000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompts", "p"], "--output-dir is needed with --prompts"),
        (["x", "--prompts", "p", "--output-dir", "d"], "PROMPT can't be used with --prompts"),
        (["--prompts", "p", "--output-dir", "d", "-o", "x.wav"], "-o can't be used with --prompts"),
        (["--prompts", "p", "--output-dir", "d", "--play"], "--play can't be used with --prompts"),
        (["x", "-o", "x.wav", "--output-dir", "d"], "--output-dir can't be used without --prompts"),
        (["x", "-o", "x.wav", "--concurrency", "2"], "--concurrency can't be used without --prompts"),
        (["-o", "x.wav"], "PROMPT is needed without --prompts"),
    ],
)
def test_options_that_do_not_go_together_are_bad_usage(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_key_comes_from_the_environment_and_is_never_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AUDIOLDM2_API_KEY", "s3cret")
    arguments = make_parser().parse_args(["x", "-o", "x.wav", "--header", "X-Other: 1: 2"])
    assert client_settings(arguments)["headers"] == {"authorization": "Bearer s3cret", "x-other": "1: 2"}
    assert main(["x", "-o", str(tmp_path / "x.wav"), "--url", "127.0.0.1:1", "--header", "s3cret"]) == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    captured = capsys.readouterr()
    assert "s3cret" not in captured.out + captured.err


def test_help_has_examples_and_every_exit_status(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert text.count("\n  audioldm2 ") == 5
    for status in ("0 done", "1 the", "2 bad", "3 server", "4 not", "5 the", "130 interrupted"):
        assert status in text
