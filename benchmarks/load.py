"""Mixed requests of many clients: batched continuously, one at a time, and in diffusers.

`python -m benchmarks.load`; about fifteen minutes. Requests arrive as a Poisson process, and each one's latency counts
from its planned arrival, so that waiting clients don't slow the load down. Every way gets the same arrivals.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from audioldm2_client import AudioLDM2Client

from benchmarks.latency import Diffusers
from benchmarks.report import Plot, Report, Samples, Table
from benchmarks.repositories import copy_with, export_new_checkpoint, parameter, refuse_nothing
from export.demo import write_checkpoint
from server import EmbeddedServer

PROMPTS = (
    "a dog barking in the rain",
    "church bells ringing far away while a car passes by",
    "a slow piano melody with soft strings",
    "a crowd cheering in a stadium, recorded from the stands, with a whistle in the middle of it",
)
LENGTHS_S = (0.64, 1.28, 2.56)
STEPS = (5, 10, 20)
PERCENTILES = (50, 95, 99)
MIX = f"{', '.join(f'{length:g}' for length in LENGTHS_S)} s; {', '.join(map(str, STEPS))} steps, guidance"
CLIENTS = 16
LOAD = 0.8
BATCHED, ONE_AT_A_TIME = "continuous batching", "one request at a time"
Run = tuple[list[float], float]
"""Latencies, and the time to the last answer, in seconds."""


@dataclass(frozen=True)
class Call:
    """One request of the load.

    Attributes:
        at_s: When it arrives, in seconds from the start.
        prompt: What to hear.
        length_s: Seconds of audio.
        steps: Denoising steps.
        seed: Of the noise.
    """

    at_s: float
    prompt: str
    length_s: float
    steps: int
    seed: int


Generate = Callable[[Call], object]


def draw_calls(rate: float, count: int, seed: int) -> list[Call]:
    """Draw a Poisson process: `count` mixed requests, `rate` of them per second on average."""
    draw = random.Random(seed)
    calls, at_s = [], 0.0
    for number in range(count):
        at_s += draw.expovariate(rate)
        calls.append(Call(at_s, draw.choice(PROMPTS), draw.choice(LENGTHS_S), draw.choice(STEPS), seed=number))
    return calls


def run_open_loop(generate: Generate, calls: list[Call]) -> Run:
    """Send every call at its time, however many are under way."""
    start = time.perf_counter()

    def timed(call: Call) -> float:
        generate(call)
        return time.perf_counter() - start - call.at_s

    with ThreadPoolExecutor(len(calls)) as pool:
        futures = []
        for call in calls:
            time.sleep(max(0.0, start + call.at_s - time.perf_counter()))
            futures.append(pool.submit(timed, call))
        latencies = [future.result() for future in futures]
    return latencies, time.perf_counter() - start


def run_closed_loop(generate: Generate, calls: list[Call]) -> float:
    """Let CLIENTS clients send the calls as fast as they are answered; return requests per second."""
    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(generate, calls))
    return len(calls) / (time.perf_counter() - start)


def served(repository: Path, stack: ExitStack) -> Generate:
    """Start a server; return what asks it."""
    client = stack.enter_context(AudioLDM2Client(stack.enter_context(EmbeddedServer(repository)).grpc_url))
    return lambda call: client.generate(
        call.prompt,
        audio_length_in_s=call.length_s,
        num_inference_steps=call.steps,
        guidance_scale=3.5,
        seed=call.seed,
    )


def in_diffusers(checkpoint: Path, stack: ExitStack) -> Generate:
    """Load diffusers' pipeline; return what asks it. One thread does it all, so that there is one OpenMP team."""
    worker = stack.enter_context(ThreadPoolExecutor(1))
    diffusers = worker.submit(Diffusers, checkpoint).result()
    return lambda call: worker.submit(diffusers.generate, call.length_s, call.steps, call.prompt).result()


def prepare(folder: Path, stack: ExitStack, *, with_diffusers: bool) -> dict[str, Generate]:
    """Return what answers a call, in each way."""
    exported = export_new_checkpoint(folder)
    patient = refuse_nothing()
    batched = copy_with(exported, folder / "batched", patient)
    single = [*patient["unet"], parameter("max_rows", "1")]
    one_at_a_time = copy_with(exported, folder / "one_at_a_time", patient | {"unet": single})
    ways = {BATCHED: served(batched, stack), ONE_AT_A_TIME: served(one_at_a_time, stack)}
    if with_diffusers:
        write_checkpoint(folder / "lm_head", language_model="GPT2LMHeadModel")
        ways["diffusers, one at a time"] = in_diffusers(folder / "lm_head", stack)
    return ways


def measure(arguments: argparse.Namespace, report: Report) -> None:
    """Find the capacities, and then load the ways in turns with 80 % of them."""
    with tempfile.TemporaryDirectory(prefix="load-") as folder, ExitStack() as stack:
        ways = prepare(Path(folder), stack, with_diffusers=not arguments.long)
        for generate in ways.values():
            run_closed_loop(generate, draw_calls(1.0, 6, seed=0))  # warm up
        capacities: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(arguments.repeats):
            for name, generate in ways.items():
                calls = draw_calls(1.0, arguments.requests // 2, seed=100 + repeat)
                capacities[name].append(run_closed_loop(generate, calls))
                print(f"{repeat + 1}/{arguments.repeats} {name}: {capacities[name][-1]:.2f} requests/s", flush=True)
        tabulate_capacities(report, capacities)
        for name in (BATCHED,) if arguments.long else (ONE_AT_A_TIME, BATCHED):
            rate = LOAD * float(np.median(capacities[name]))
            compared = {way: generate for way, generate in ways.items() if way in (ONE_AT_A_TIME, BATCHED)}
            runs = measure_rate(compared, rate, arguments)
            summaries = {way: [summarize(run) for run in way_runs] for way, way_runs in runs.items()}
            report.measurements[f"{LOAD:.0%} of the capacity of {name}"] = {"rate": rate, "runs": summaries}
            tabulate_latencies(report, name, runs, rate, arguments.requests)
    report.measurements["capacities"] = capacities


def measure_rate(ways: dict[str, Generate], rate: float, arguments: argparse.Namespace) -> dict[str, list[Run]]:
    """Load the ways in turns; return the latencies and the duration of every run."""
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats):
        calls = draw_calls(rate, arguments.requests, seed=repeat)
        for name, generate in ways.items():
            runs[name].append(run_open_loop(generate, calls))
            p95 = np.percentile(runs[name][-1][0], 95)
            print(f"{repeat + 1}/{arguments.repeats} {rate:.2f}/s, {name}: p95 {p95:.2f} s", flush=True)
    return runs


def summarize(run: Run) -> dict[str, float]:
    """Return the percentiles of the latencies and the duration, in seconds."""
    latencies, duration_s = run
    percentiles = {f"p{percentile}": float(np.percentile(latencies, percentile)) for percentile in PERCENTILES}
    return {**percentiles, "duration": duration_s}


def tabulate_capacities(report: Report, capacities: dict[str, list[float]]) -> None:
    """Add how many requests each way answers."""
    single = float(np.median(capacities[ONE_AT_A_TIME]))
    report.add(
        Table(
            f"As many requests as are answered, {CLIENTS} clients ({MIX})",
            ("", "throughput", "of one at a time"),
            tuple(
                (name, str(Samples(tuple(values), "requests/s")), f"{np.median(values) / single:.2f}")
                for name, values in capacities.items()
            ),
        )
    )


def tabulate_latencies(report: Report, whose: str, runs: dict[str, list[Run]], rate: float, requests: int) -> None:
    """Add the percentiles and the distribution at one rate."""
    p95 = {name: [float(np.percentile(latencies, 95)) for latencies, _ in way] for name, way in runs.items()}
    reference = float(np.median(p95[ONE_AT_A_TIME]))
    audio_s = sum(call.length_s for call in draw_calls(rate, requests, seed=0))
    load = f"{rate:.2f} requests per second, {LOAD:.0%} of the capacity of {whose}"
    report.add(
        Table(
            f"Poisson arrivals, {load} ({MIX})",
            ("", *(f"p{percentile}" for percentile in PERCENTILES), "p95 against one at a time", "audio"),
            tuple(
                (
                    name,
                    *(
                        str(Samples(tuple(float(np.percentile(one, percentile)) for one, _ in way), "s"))
                        for percentile in PERCENTILES
                    ),
                    f"{np.median(p95[name]) / reference:.2f}",
                    f"{audio_s / np.median([total for _, total in way]):.2f} s/s",
                )
                for name, way in runs.items()
            ),
            note=f"{requests} requests in each run, with the same arrivals for both.",
        )
    )
    report.plots.append(
        Plot(
            f"Latencies at {load}",
            "latency in s",
            "share of requests answered within it",
            {name: _distribution([value for one, _ in way for value in one]) for name, way in runs.items()},
        )
    )


def _distribution(values: list[float]) -> list[tuple[float, float]]:
    return [(value, (index + 1) / len(values)) for index, value in enumerate(sorted(values))]


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60, help="of each run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="only at batching's capacity, without diffusers")
    arguments = parser.parse_args()
    command = f"python -m benchmarks.load --requests {arguments.requests}"
    report = Report("load_poisson", "Load: mixed requests, demo size", command)
    if arguments.long:
        report = Report(
            "load_poisson_long", "Load: more requests at batching's capacity, demo size", f"{command} --long"
        )
    measure(arguments, report)
    report.save()


if __name__ == "__main__":
    main()
