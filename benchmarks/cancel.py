"""How long a cancel takes, from each of the ways to ask for it, in steps of the generation that it ends.

`python -m benchmarks.cancel`; two minutes. The page's button takes Chromium: `make .venv/chromium/chromium`.
"""

import argparse
import asyncio
import contextlib
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from audioldm2_client import AsyncAudioLDM2Client, RequestCancelledError
from playwright.sync_api import expect, sync_playwright

from benchmarks.report import Report, Samples, Table
from benchmarks.repositories import export_new_checkpoint
from server import EmbeddedServer
from tests.helpers import job_calls
from tests.helpers.chromium import environment_of, find_chromium
from tests.helpers.page_server import PageServer
from tests.helpers.terminal import Terminal

STEPS = 100
LENGTH_S = 5.12
SEEN_STEPS = 12
"""Different ones that have to be seen before the cancel."""


def require(condition: bool, sentence: str) -> None:
    """Raise RuntimeError with the sentence where the condition doesn't hold."""
    if not condition:
        raise RuntimeError(sentence)


@dataclass
class Watched:
    """One generation that was cancelled.

    Attributes:
        seen: time (`time.perf_counter`) and number of each new step, as the caller was told.
        cancelled: when the cancel was asked for.
        told: when the caller knew that the generation was cancelled.
        free: when the server's metrics showed no generation any more.
    """

    seen: list[tuple[float, int]] = field(default_factory=list)
    cancelled: float = 0
    told: float = 0
    free: float = 0

    def note(self, step: int) -> bool:
        """Note a step; return whether enough were seen."""
        if step and (not self.seen or step != self.seen[-1][1]):
            require(not self.seen or step > self.seen[-1][1], "the steps must rise")
            self.seen.append((time.perf_counter(), step))
        return len(self.seen) >= SEEN_STEPS

    @property
    def step_s(self) -> float:
        """Seconds of one step of this generation."""
        (start, first), (end, last) = self.seen[0], self.seen[-1]
        return (end - start) / (last - first)

    @property
    def delays(self) -> dict[str, float]:
        """Seconds: of one step, and from the cancel until the caller knew and until the rows were free."""
        return {"step": self.step_s, "told": self.told - self.cancelled, "free": self.free - self.cancelled}


def over_http(server: EmbeddedServer, watched: Watched) -> None:
    """`generate` and `jobs` over HTTP, as curl would."""
    request_id = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(
            job_calls.generate, server, request_id, num_inference_steps=STEPS, audio_length_in_s=LENGTH_S
        )
        while not watched.note(job_calls.ask(server, request_id)["step"]):
            time.sleep(0.01)
        watched.cancelled = time.perf_counter()
        job_calls.ask(server, request_id, "cancel")
        require("[CANCELLED]" in answer.result(60).error, "the caller must be told")
        watched.told = time.perf_counter()


def by_asyncio(server: EmbeddedServer, watched: Watched) -> None:
    """`AsyncAudioLDM2Client` over gRPC: `generation.cancel()`."""

    async def run() -> None:
        async with AsyncAudioLDM2Client(server.grpc_url) as client:
            generation = client.submit("a storm", num_inference_steps=STEPS, audio_length_in_s=LENGTH_S)
            while not watched.note((await generation.progress()).step):
                await asyncio.sleep(0.01)
            watched.cancelled = time.perf_counter()
            await generation.cancel()
            with contextlib.suppress(RequestCancelledError):
                await generation.result()
            watched.told = time.perf_counter()

    asyncio.run(run())


def by_ctrl_c(server: EmbeddedServer, watched: Watched) -> None:
    """The command line in a pseudo-terminal: Ctrl-C, until the process has ended."""
    with tempfile.TemporaryDirectory() as folder:
        terminal = Terminal(
            *(sys.executable, "-m", "audioldm2_client", "a storm", "-o", f"{folder}/storm.wav"),
            *("--url", server.grpc_url, "--steps", str(STEPS), "--length", str(LENGTH_S)),
        )
        seen = 0
        while not watched.note(seen):
            terminal.read(0.05)
            seen = max((int(step) for step in re.findall(rf"(\d+)/{STEPS} steps", terminal.text)), default=0)
        watched.cancelled = time.perf_counter()
        terminal.press_ctrl_c()
        require(terminal.wait() == 130, "the exit status must be 130")
        watched.told = time.perf_counter()


@contextlib.contextmanager
def open_page(
    server: EmbeddedServer, folder: Path, chromium: Path
) -> Iterator[Callable[[EmbeddedServer, Watched], None]]:
    """Open the page in Chromium; give what generates there, and cancels with the button."""
    folder.mkdir()
    with PageServer(folder, server.grpc_url) as page, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, env={**environment_of(chromium)})
        tab = browser.new_page()
        tab.goto(page.url)
        values = {"prompt": "a storm", "num_inference_steps": STEPS, "audio_length_in_s": LENGTH_S}

        def by_button(_: EmbeddedServer, watched: Watched) -> None:
            for name, value in values.items():
                tab.locator(f"#{name} :is(input, textarea)").first.fill(str(value))
            tab.locator("#generate").click()
            seen = 0
            while not watched.note(seen):
                found = re.search(rf"step (\d+) of {STEPS}", tab.locator("#status").inner_text())
                seen = int(found[1]) if found else 0
                tab.wait_for_timeout(10)
            watched.cancelled = time.perf_counter()
            tab.locator("#cancel").click()
            expect(tab.locator("#status")).to_have_text("cancelled")
            watched.told = time.perf_counter()

        yield by_button
        browser.close()


def measure_cancel(server: EmbeddedServer, caller: Callable[[EmbeddedServer, Watched], None]) -> Watched:
    """Generate, cancel, and wait until the rows are free."""
    watched = Watched()
    caller(server, watched)
    job_calls.wait_until_rows_are_free(server)
    watched.free = time.perf_counter()
    return watched


def as_row(title: str, runs: list[Watched]) -> tuple[str, ...]:
    """Return the cells of one way to cancel."""
    return (
        title,
        str(Samples(tuple(run.step_s for run in runs), "s")),
        str(Samples(tuple(run.delays["told"] for run in runs), "s")),
        str(Samples(tuple(run.delays["told"] / run.step_s for run in runs), "steps")),
        str(Samples(tuple(run.delays["free"] for run in runs), "s")),
    )


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if (chromium := find_chromium()) is None:
        parser.error("no Chromium on this machine: make .venv/chromium/chromium")
    report = Report("cancel", "Cancelling", "python -m benchmarks.cancel")
    with (
        tempfile.TemporaryDirectory(prefix="cancel-") as name,
        EmbeddedServer(export_new_checkpoint(Path(name))) as server,
    ):
        callers = {
            "`generate` and `jobs` over HTTP": over_http,
            "`AsyncAudioLDM2Client` over gRPC": by_asyncio,
            "Ctrl-C in the command line": by_ctrl_c,
        }
        runs = {
            title: [measure_cancel(server, caller) for _ in range(arguments.repeats)]
            for title, caller in callers.items()
        }
        with open_page(server, Path(name) / "page", chromium) as by_button:  # no other event loop can run beside it
            runs["the page's button"] = [measure_cancel(server, by_button) for _ in range(arguments.repeats)]
    report.measurements.update({title: [run.delays for run in all_runs] for title, all_runs in runs.items()})
    report.add(
        Table(
            f"From the cancel to the caller's knowledge (demo, {LENGTH_S} s, {STEPS} steps)",
            ("asked for by", "one step", "until the caller knows", "in steps", "until the rows are free, at most"),
            tuple(as_row(title, all_runs) for title, all_runs in runs.items()),
            note=f"Each was cancelled after {SEEN_STEPS} different steps were seen, in rising order. The "
            "command line's figure includes the end of the process; the rows are looked at once the caller knows.",
        )
    )
    report.save()


if __name__ == "__main__":
    main()
