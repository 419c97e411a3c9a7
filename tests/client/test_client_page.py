"""The page, in a real Chromium, over the real models.

Every test also claims that the browser connects to the page alone, and that nothing fails in its scripts.
"""

import contextlib
import http.client
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import soundfile
from audioldm2_client import AudioLDM2Client, InvalidRequestError
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from server import EmbeddedServer
from tests.helpers.chromium import environment_of, find_chromium
from tests.helpers.job_calls import rows_are_free, wait_until_rows_are_free
from tests.helpers.page_server import PageServer
from tests.helpers.waiting import taken_port, wait_until

TIMEOUT_S = 60
STEPS = re.compile(r"denoising, step [1-9]\d* of 999")

expect.set_options(timeout=TIMEOUT_S * 1000)


def require_chromium() -> Path:
    """The program, or why there is none."""
    if program := find_chromium():
        return program
    reason = "no Chromium on this machine, and `make .venv/chromium/chromium` couldn't get one (it takes npm)"
    if os.environ.get("PAGE_TESTS") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of this module alone: while Playwright is open, no other test could run an event loop in this thread."""
    program = require_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, env=environment_of(program))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def page_server(triton: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with PageServer(tmp_path_factory.mktemp("page"), triton.grpc_url, "--header", "x-key: hush") as server:
        yield server
    assert server.errors == ""


@pytest.fixture
def open_tab(browser: Browser, page_server: PageServer) -> Iterator[Callable[..., Page]]:
    """Opens a tab with the page; at the end of the test it is asked what went wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    wrong: list[str] = []

    def open_tab(url: str = page_server.url) -> Page:
        tab = context.new_page()
        tab.on("request", lambda request: urlsplit(request.url).scheme in ("data", "blob") or ask(request.url, url))
        tab.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(url)
        expect(tab.locator("#generate")).to_be_enabled()
        return tab

    def ask(asked: str, url: str) -> None:
        if urlsplit(asked).netloc != urlsplit(url).netloc:
            wrong.append(f"asked {asked}")

    yield open_tab
    context.close()
    assert wrong == []


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port without a listener, held so that no other process can take it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def fill(tab: Page, **values: object) -> None:
    for name, value in values.items():
        tab.locator(f"#{name} :is(input, textarea)").first.fill(str(value))


def generate(tab: Page, **values: object) -> None:
    """Fill in the form and wait for the result."""
    fill(tab, **values)
    tab.locator("#generate").click()
    expect(tab.locator("#status")).to_contain_text("done in")


def start_long(tab: Page) -> None:
    """Start what takes minutes, and wait for its first steps."""
    fill(tab, prompt="a storm", num_inference_steps=999, audio_length_in_s=20)
    tab.locator("#generate").click()
    expect(tab.locator("#status")).to_contain_text(STEPS)


def seed_of(tab: Page) -> int:
    found = re.search(r"seed (\d+)", tab.locator("#status").inner_text())
    assert found is not None
    return int(found[1])


def durations_s(tab: Page) -> list[float]:
    """What the players say, once they know."""
    tab.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#results audio')];"
        " return all.length > 0 && all.every(audio => audio.readyState > 0) }"
    )
    return tab.locator("#results audio").evaluate_all("all => all.map(audio => audio.duration)")


def audio_bytes(tab: Page, index: int = 0) -> bytes:
    return tab.request.get(tab.locator("#results audio").nth(index).evaluate("audio => audio.src")).body()


def status_of(url: str, **headers: str) -> int:
    """The answer's status; the path is sent as it stands."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request("GET", parts.path or "/", headers=headers)
        return connection.getresponse().status


def test_generation_shows_progress_then_players_spectrograms_and_scores(open_tab, request):
    tab = open_tab()
    fill(tab, prompt="a dog barking in the rain", audio_length_in_s=2.5, num_inference_steps=40, seed=7)
    fill(tab, num_waveforms_per_prompt=2)
    tab.locator("#scheduler input").click()
    tab.get_by_role("option", name="euler", exact=True).click()
    tab.locator("#generate").click()
    expect(tab.locator("#status")).to_contain_text(re.compile(r"denoising, step \d+ of 40"))
    assert 0 <= tab.locator("#status progress").evaluate("bar => bar.position") <= 1
    expect(tab.locator("#status")).to_contain_text(re.compile(r"done in [\d.]+ s, seed 7"))
    assert durations_s(tab) == pytest.approx([2.5, 2.5], abs=0.01)
    widths = tab.locator("#results img").evaluate_all(
        "all => Promise.all(all.map(i => i.decode().then(() => i.width)))"
    )
    assert len(widths) == 2
    assert min(widths) > 100
    scores = re.findall(r"candidate \d, CLAP score (-?\d\.\d{3})", tab.locator("#results").inner_text())
    assert sorted(map(float, scores), reverse=True) == [float(score) for score in scores]
    assert len(scores) == 2
    if path := request.config.getoption("--page-screenshot"):
        picture = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
        picture.convert("RGB").quantize(128).save(path, optimize=True)


def test_cancel_button_frees_the_servers_rows(open_tab, triton):
    tab = open_tab()
    start_long(tab)
    assert not rows_are_free(triton)
    tab.locator("#cancel").click()
    expect(tab.locator("#status")).to_have_text("cancelled")
    wait_until_rows_are_free(triton)
    expect(tab.locator("#generate")).to_be_enabled()
    expect(tab.locator("#cancel")).to_be_disabled()


def test_closed_tab_cancels_on_the_server(open_tab, triton):
    tab = open_tab()
    start_long(tab)
    tab.close()
    wait_until_rows_are_free(triton)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_inference_steps", 0), ("guidance_scale", -1.5)],
)
def test_bad_value_shows_the_servers_own_sentence(open_tab, triton, name, value):
    with AudioLDM2Client(triton.grpc_url) as client, pytest.raises(InvalidRequestError) as refused:
        client.generate("a dog", **{name: value})
    tab = open_tab()
    fill(tab, prompt="a dog", **{name: value})
    tab.locator("#generate").click()
    expect(tab.locator("#status")).to_have_text(str(refused.value))
    expect(tab.locator("#generate")).to_be_enabled()


def test_value_that_cannot_be_sent_is_explained(open_tab):
    tab = open_tab()
    fill(tab, prompt="a dog", seed="seven")
    tab.locator("#generate").click()
    expect(tab.locator("#status")).to_contain_text(
        "seed must be a whole number, or empty for the server's choice; got 'seven'"
    )


def test_again_repeats_the_drawn_seed_and_generate_draws_another(open_tab):
    tab = open_tab()
    expect(tab.locator("#again")).to_be_disabled()
    generate(tab, prompt="rain", audio_length_in_s=0.5, num_inference_steps=2)
    seed, audio = seed_of(tab), audio_bytes(tab)
    tab.locator("#again").click()
    expect(tab.locator("#history label")).to_have_count(2)
    assert (seed_of(tab), audio_bytes(tab)) == (seed, audio)
    tab.locator("#generate").click()
    expect(tab.locator("#history label")).to_have_count(3)
    assert seed_of(tab) != seed


def test_tabs_do_not_disturb_each_other(open_tab, triton):
    busy, other = open_tab(), open_tab()
    start_long(busy)
    generate(other, prompt="a bird", audio_length_in_s=0.5, num_inference_steps=2)
    expect(busy.locator("#status")).to_contain_text(STEPS)
    expect(busy.locator("#history label")).to_have_count(0)
    expect(busy.locator("#results audio")).to_have_count(0)
    assert not rows_are_free(triton)
    busy.locator("#cancel").click()
    expect(busy.locator("#status")).to_have_text("cancelled")
    expect(other.locator("#results audio")).to_have_count(1)
    expect(other.locator("#status")).to_contain_text("done in")


def test_history_gives_back_earlier_results_and_their_programs(open_tab, triton, tmp_path):
    tab = open_tab()
    prompt = 'a dog\'s "bark", <b>loud</b> & $HOME \\ near'
    generate(tab, prompt=prompt, audio_length_in_s=0.5, num_inference_steps=2, guidance_scale=2.5)
    seed, audio = seed_of(tab), audio_bytes(tab)
    fill(tab, prompt="a bell")
    tab.locator("#generate").click()
    expect(tab.locator("#history label")).to_have_count(2)
    tab.locator("#history label", has_text="bark").click()
    expect(tab.locator("#python")).to_contain_text(f"seed={seed}")
    program = "\n".join(tab.locator("#python .cm-line").all_inner_texts())
    tab.get_by_role("tab", name="curl").click()
    command = "\n".join(tab.locator("#curl .cm-line").all_inner_texts())
    assert audio_bytes(tab) == audio
    assert "hush" not in program + command
    environment = {**os.environ, "X_KEY": "hush"}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, env=environment, check=True, timeout=60
    )
    assert (tmp_path / "audio-1.wav").read_bytes() == audio
    host = triton.grpc_url.rpartition(":")[0]
    moved = command.replace(f"http://{host}:8000", f"http://{triton.http_url}")
    done = subprocess.run(["/bin/sh", "-c", moved], env=environment, capture_output=True, text=True, timeout=60)
    assert f'"used_seed":{seed}' in done.stdout, done.stdout + done.stderr


def test_missing_server_is_explained_and_ctrl_c_leaves_nothing(open_tab, closed_port, tmp_path):
    with PageServer(tmp_path, f"127.0.0.1:{closed_port}") as server:
        tab = open_tab(server.url)
        fill(tab, prompt="a dog")
        tab.locator("#generate").click()
        expect(tab.locator("#status")).to_contain_text("can't reach a Triton server at grpc://127.0.0.1:")
        assert list(server.temporary.iterdir()) != []
        assert server.end(signal.SIGINT) == 0
    assert server.errors == ""
    assert list(server.temporary.iterdir()) == []
    tab.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_end_of_the_page_cancels_what_runs(browser, triton, tmp_path, number):
    with PageServer(tmp_path, triton.grpc_url) as server, browser.new_context() as context:
        for _ in range(2):
            tab = context.new_page()
            tab.goto(server.url)
            start_long(tab)
        start = time.monotonic()
        assert server.end(number) == 0
        assert time.monotonic() - start < 10
    assert server.errors == ""
    assert list(server.temporary.iterdir()) == []
    wait_until_rows_are_free(triton)


def test_page_ends_within_seconds_where_the_server_says_nothing(browser, tmp_path):
    with taken_port() as port, PageServer(tmp_path, f"127.0.0.1:{port}") as server, browser.new_context() as context:
        for _ in range(3):
            tab = context.new_page()
            tab.goto(server.url)
            fill(tab, prompt="a storm")
            tab.locator("#generate").click()
            expect(tab.locator("#cancel")).to_be_enabled()
        start = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - start < 15
    assert server.errors == ""
    assert list(server.temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_second_signal_ends_the_page_at_once(browser, tmp_path, number):
    with taken_port() as port, PageServer(tmp_path, f"127.0.0.1:{port}") as server, browser.new_context() as context:
        tab = context.new_page()
        tab.goto(server.url)
        fill(tab, prompt="a storm")
        tab.locator("#generate").click()
        expect(tab.locator("#cancel")).to_be_enabled()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not catches(server.process.pid, number), 20, "the first one has arrived")
        assert server.end(number) == -number


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def test_only_its_own_results_are_served_and_only_here(open_tab, page_server):
    tab = open_tab()
    generate(tab, prompt="a bell", audio_length_in_s=0.5, num_inference_steps=2)
    assert soundfile.info(io.BytesIO(audio_bytes(tab))).duration == pytest.approx(0.5, abs=0.01)
    for path in ("results/../../etc/passwd", "gradio_api/file=/etc/passwd", "gradio_api/upload", "gradio_api/info"):
        assert status_of(f"{page_server.url}/{path}") in (403, 404), path
    assert status_of(page_server.url, host="evil.example") == 403
    assert status_of(page_server.url, origin="http://evil.example") == 403
    assert status_of(page_server.url) == 200


def test_page_connects_to_triton_alone(open_tab, page_server):
    generate(open_tab(), prompt="a bell", audio_length_in_s=0.5, num_inference_steps=2)
    assert page_server.connections == set()  # gRPC's own connections aren't Python's
