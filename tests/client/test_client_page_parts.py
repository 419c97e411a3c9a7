"""The page's parts that need no browser: its options, what it sends, what it shows, what it remembers."""

import math
import re
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from audioldm2_client import AudioLDM2Client, GenerationResult, Progress, TlsOptions
from audioldm2_client._cli.main import main
from audioldm2_client._ui import markup, session
from audioldm2_client._ui.form import read_options
from audioldm2_client._ui.guard import LOOPBACK_NAMES, refusal
from audioldm2_client._ui.session import ClosedSessionError, Sessions
from audioldm2_client._ui.snippets import Connection, as_curl, as_python

LOCAL = Connection(["localhost:8001"], "audioldm2", 600.0, None, ())
PAGE = {"host": "127.0.0.1:7860"}


def make_result(rows: int = 1, seed: int = 7) -> GenerationResult:
    scores = np.linspace(0.9, 0.1, rows) if rows > 1 else np.full(rows, math.nan)
    audio = np.random.default_rng(seed).uniform(-0.5, 0.5, (rows, 8000)).astype(np.float32)
    return GenerationResult(audio, 16000, seed, scores.astype(np.float32), ("a dog",), np.zeros(1, np.int32))


def test_what_is_left_empty_is_not_sent():
    empty = {
        "prompt": "a dog",
        "negative_prompt": "",
        "num_inference_steps": "",
        "scheduler": None,
        "seed": "  ",
    }
    assert read_options(empty) == {"prompt": "a dog"}


def test_empty_prompt_is_left_to_the_server():
    assert read_options({"prompt": None}) == {"prompt": ""}


def test_numbers_are_sent_as_numbers():
    values = {"prompt": "a", "audio_length_in_s": "2.5", "num_inference_steps": " 20 ", "guidance_scale": "inf"}
    assert read_options(values) == {
        "prompt": "a",
        "audio_length_in_s": 2.5,
        "num_inference_steps": 20,
        "guidance_scale": math.inf,
    }


def test_seed_keeps_all_its_digits():
    assert read_options({"prompt": "a", "seed": f" {2**63 - 1} "})["seed"] == 2**63 - 1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"num_inference_steps": "2.5"},
            "num_inference_steps must be a whole number, or empty for the server's choice",
        ),
        (
            {"audio_length_in_s": "5 s"},
            "audio_length_in_s must be a number, or empty for the server's choice; got '5 s'",
        ),
        ({"seed": "0x7"}, "seed must be a whole number, or empty for the server's choice; got '0x7'"),
    ],
)
def test_value_that_cannot_be_sent_is_named(values, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_options({"prompt": "a", **values})


def test_python_names_the_connection_but_no_secret():
    tls = TlsOptions(ca_file="ca.pem")
    program = as_python({"prompt": "a", "seed": 7}, Connection(["a:1", "b:2"], "music", 5.0, tls, ("x-key",)))
    compile(program, "program", "exec")
    assert (
        "AudioLDM2Client(['a:1', 'b:2'], model_name='music', timeout_s=5.0, tls=TlsOptions(ca_file='ca.pem'), "
        "headers={'x-key': os.environ[\"X_KEY\"]})" in program
    )


def test_curl_goes_to_the_http_port_of_the_first_server():
    assert as_curl({"prompt": "it's"}, LOCAL) == (
        "# 8000 is Triton's port for HTTP, unless configured\n"
        'curl \\\n  -d \'{"prompt": "it\'"\'"\'s"}\' \\\n  http://localhost:8000/v2/models/audioldm2/generate\n'
    )


def test_curl_keeps_an_http_url_its_files_and_its_headers():
    connection = Connection(["https://gpu:443/base"], "audioldm2", 600.0, TlsOptions(ca_file="ca.pem"), ("x-key",))
    command = as_curl({"prompt": "a"}, connection)
    for part in ("--cacert ca.pem", '-H "x-key: $X_KEY"', "https://gpu:443/base/v2/models/audioldm2/generate"):
        assert part in command


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (None, "generating"),
        (Progress("unknown"), "generating"),
        (Progress("queued", requests_ahead=2), "queued, 2 ahead"),
        (Progress("queued"), "queued"),
        (Progress("denoising", 3, 20), "denoising, step 3 of 20"),
        (Progress("decoding", 20, 20), "decoding"),
    ],
)
def test_progress_is_said_in_words(progress, words):
    assert f'<div role="status">{words}</div>' in markup.progress(progress)


def test_texts_from_outside_are_escaped(tmp_path):
    entry = Sessions(tmp_path).of("tab").keep(make_result(), {"prompt": "<script>"}, 1.0)
    assert "<script>" not in markup.failure("<script>") + markup.results(entry) + markup.done(entry)


def test_scores_are_shown_for_several_candidates_alone(tmp_path):
    tab = Sessions(tmp_path).of("tab")
    assert "CLAP" not in markup.results(tab.keep(make_result(), {"prompt": "a"}, 1.0))
    assert "candidate 2, CLAP score 0.100" in markup.results(tab.keep(make_result(2), {"prompt": "a"}, 1.0))


def test_history_forgets_the_oldest_with_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "MAX_ENTRIES", 2)
    sessions = Sessions(tmp_path)
    entries = [sessions.of("tab").keep(make_result(seed=seed), {"prompt": "a"}, 1.0) for seed in range(3)]
    assert [entry.number for entry in sessions.of("tab").entries] == [2, 3]
    assert sessions.file(entries[0].clips[0].audio) is None
    assert len(list(tmp_path.rglob("*.wav"))) == len(list(tmp_path.rglob("*.png"))) == 2


def test_quiet_tabs_are_forgotten_where_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "MAX_SESSIONS", 2)
    sessions = Sessions(tmp_path)
    for tab in ("one", "two", "one", "three"):
        sessions.of(tab).keep(make_result(), {"prompt": tab}, 1.0)
    assert [len(sessions.of(tab).entries) for tab in ("one", "three")] == [2, 1]
    assert len(list(tmp_path.iterdir())) == 2


def test_closed_tab_keeps_and_starts_nothing(tmp_path):
    sessions = Sessions(tmp_path)
    tab = sessions.of("tab")
    sessions.forget("tab")
    with pytest.raises(ClosedSessionError):
        tab.keep(make_result(), {"prompt": "a"}, 1.0)
    with AudioLDM2Client() as client, pytest.raises(ClosedSessionError):
        tab.start(client, {"prompt": "a"})
    assert list(tmp_path.iterdir()) == []


def test_files_of_results_are_private_and_others_cannot_be_named(tmp_path):
    sessions = Sessions(tmp_path)
    (tmp_path / "secret").write_text("hush")
    clip = sessions.of("tab").keep(make_result(), {"prompt": "a"}, 1.0).clips[0]
    path = sessions.file(clip.audio)
    assert path is not None
    assert path.parent.stat().st_mode & 0o077 == 0
    folder = clip.audio.partition("/")[0]
    for name in ("secret", f"{folder}/../secret", str(tmp_path / "secret"), folder, ""):
        assert sessions.file(name) is None


@pytest.mark.parametrize(
    ("path", "headers", "refused"),
    [
        ("/", {}, False),
        ("/", {"host": "localhost:7860"}, False),
        ("/", {"host": "evil.example"}, True),
        ("/", {"host": "evil.example:7860"}, True),
        ("/", {"host": ""}, True),
        ("/gradio_api/queue/join", {"origin": "http://127.0.0.1:7860"}, False),
        ("/gradio_api/queue/join", {"origin": "http://127.0.0.1:80"}, True),
        ("/gradio_api/queue/join", {"origin": "null"}, True),
        ("/gradio_api/upload", {}, True),
        ("/gradio_api/file=/etc/passwd", {}, True),
        ("/gradio_api/proxy=http://evil.example/", {}, True),
        ("/monitoring", {}, True),
    ],
)
def test_what_is_not_the_pages_is_refused(path, headers, refused):
    assert (refusal(path, PAGE | headers, LOOPBACK_NAMES) is not None) == refused


def test_port_in_use_is_named_and_bad_usage(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"audioldm2: port {port} of 127.0.0.1 is in use; choose another with --port, or 0 for a free one\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "65536"], "must be a port from 0 to 65535; got '65536'"),
        (["--host", "256.0.0.1"], "can't listen on port 7860 of '256.0.0.1'"),
        (["--url", "ftp://a:1"], "url must start with grpc://"),
        (["--header", "hush"], "--header must be 'NAME: VALUE'"),
    ],
)
def test_bad_usage_is_explained(arguments, words, capsys):
    try:
        status = main(["ui", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert words in capsys.readouterr().err


def test_missing_gradio_is_explained():
    code = (
        "import sys\nsys.modules['gradio'] = None\nfrom importlib import util\nutil.find_spec = lambda name: None\n"
        "from audioldm2_client._cli.main import main\nsys.exit(main(['ui']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        "audioldm2: the page needs Gradio; install it with: pip install 'audioldm2-client[ui]'\n",
    )


def test_snippets_of_a_plain_connection_are_short():
    assert "import os" not in as_python({"prompt": "a"}, LOCAL)
    assert "timeout_s=5.0" in as_python({"prompt": "a"}, replace(LOCAL, timeout_s=5.0))
