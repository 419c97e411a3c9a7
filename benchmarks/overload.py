"""Ten times as many requests as can be answered: what is still answered, what a refusal takes, what it costs.

`python -m benchmarks.overload`; about a quarter of an hour. The server runs as it is, with the front. Two parts:

- the best throughput, by callers who send their next request when they have an answer, more of them each time; then ten
  times as many requests per second, as a Poisson process, whose latencies count from the planned arrivals;
- 150 requests with sixteen prompts of 512 tokens each, at once, whose callers then leave, and a small request.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.load import MIX, PERCENTILES, Call, draw_calls
from benchmarks.processes import ProcessLook, look_at, reset_peaks
from benchmarks.prometheus import Metrics, read_metrics, until_zero
from benchmarks.report import Report, Samples, Table
from benchmarks.repositories import export_new_checkpoint
from benchmarks.server_process import Address, ServerProcess
from benchmarks.wire import OK, PROTOCOLS, Answer, Caller, GrpcCaller, HttpCaller, RawHttpCaller, Value, WireRequest

CONCURRENCIES = (4, 8, 16, 32, 48)
OVERLOAD = 10
RAMP_S = 20.0
"""At the beginning of each measurement, not measured: the first requests that fill the server are answered together,
after as long as all of them take."""
GRPC_CHANNELS = 8
TRITON = "tritonserver"
STAGES = ("tokenizer", "text_encoder", "gpt2", "unet", "vae", "vocoder", "postprocess")
LONG_TEXT = "a dog barking in the rain " * 100
NUM_LONG = 150
LONG: dict[str, Value | list[str]] = {"prompt": [LONG_TEXT] * 16, "num_inference_steps": 20, "audio_length_in_s": 2.56}
SMALL: dict[str, Value | list[str]] = {
    "prompt": "a dog",
    "num_inference_steps": 2,
    "audio_length_in_s": 0.64,
    "seed": 1,
}
TRY_AGAIN_S = 0.1
MOST_TRIES = 100
LEAVE_AFTER_S = (0.2, 1.0, 3.0)


@dataclass(frozen=True)
class Sent:
    """One request that was answered.

    Attributes:
        call: What was asked for.
        protocol: `HTTP` or `gRPC`.
        outcome: As in `wire.Answer`.
        at_s: When it was answered, in seconds since the start.
        seconds: How long that took from the planned arrival.
        lag_s: How long of that it took to be sent: this process was late.
    """

    call: Call
    protocol: str
    outcome: str
    at_s: float
    seconds: float
    lag_s: float = 0.0


@dataclass
class Phase:
    """What was seen while requests were sent in one way.

    Attributes:
        sent: All requests.
        seconds: How long the measured part was, after the ramp.
        before: Metrics before it.
        after: Metrics after it, with nothing live.
        looks: Processes before and after.
        callers_cpu_s: Processor time of this process, which sends the requests.
    """

    sent: list[Sent]
    seconds: float
    before: Metrics
    after: Metrics
    looks: tuple[dict[str, ProcessLook], dict[str, ProcessLook]]
    callers_cpu_s: float

    @property
    def measured(self) -> list[Sent]:
        """Those that were answered in the measured part."""
        return [sent for sent in self.sent if RAMP_S <= sent.at_s < RAMP_S + self.seconds]

    @property
    def throughput(self) -> float:
        """Generations per second."""
        return sum(sent.outcome == OK for sent in self.measured) / self.seconds

    @property
    def work(self) -> float:
        """Denoising steps times seconds of audio, per second: it evens out which requests were let in."""
        return sum(s.call.steps * s.call.length_s for s in self.measured if s.outcome == OK) / self.seconds

    def refusals(self, protocol: str) -> list[Sent]:
        """Return those that were refused, over one protocol."""
        return [sent for sent in self.sent if sent.outcome == "UNAVAILABLE" and sent.protocol == protocol]

    def cpu_s(self, process: str) -> float:
        """Return the processor time that a process has used."""
        before, after = (look.get(process) for look in self.looks)
        return after.cpu_s - before.cpu_s if before and after else 0.0

    def beyond(self, model: str) -> int:
        """Return how many requests came to a stage beyond those that were answered."""
        came = self.after.arrived(model) - self.before.arrived(model)
        return int(came) - sum(sent.outcome == OK for sent in self.sent)

    def executions(self, model: str) -> int:
        """Return how often a stage was executed."""
        return int(
            self.after.total("nv_inference_exec_count", model=model)
            - self.before.total("nv_inference_exec_count", model=model)
        )


@dataclass
class Load:
    """Callers over both protocols, who take turns, and what they saw.

    Attributes:
        address: The server's.
        callers: By protocol.
        start: When it began, as `time.perf_counter` says.
        sent: What was answered.
    """

    address: Address
    callers: dict[str, Caller]
    start: float = field(default_factory=time.perf_counter)
    sent: list[Sent] = field(default_factory=list)

    async def send(self, call: Call, planned_s: float) -> None:
        """Send one request; every second one over gRPC."""
        protocol = PROTOCOLS[call.seed % 2]
        lag_s = self.now() - planned_s
        answer = await self.callers[protocol].send(wire_request(call))
        now = self.now()
        self.sent.append(Sent(call, protocol, answer.outcome, now, now - planned_s, lag_s))

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.start


def wire_request(call: Call) -> WireRequest:
    """Return what goes over the wire."""
    inputs: dict[str, Value | list[str]] = {
        "prompt": call.prompt,
        "audio_length_in_s": call.length_s,
        "num_inference_steps": call.steps,
        "seed": call.seed,
    }
    return WireRequest(f"overload-{call.seed}", inputs)


async def closed_loop(load: Load, calls: Iterator[Call], concurrency: int, seconds: float) -> None:
    """Let callers send their next request as soon as they have an answer."""

    async def one_caller() -> None:
        while load.now() < RAMP_S + seconds:
            await load.send(next(calls), load.now())

    await asyncio.gather(*(one_caller() for _ in range(concurrency)))


async def open_loop(load: Load, calls: Iterator[Call], seconds: float) -> None:
    """Send each request at its time, however many are under way."""
    tasks = set()
    for call in itertools.takewhile(lambda call: call.at_s < RAMP_S + seconds, calls):
        if (wait_s := call.at_s - load.now()) > 0:
            await asyncio.sleep(wait_s)
        tasks.add(task := asyncio.create_task(load.send(call, call.at_s)))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def callers_to(address: Address) -> AsyncIterator[dict[str, Caller]]:
    """Open callers over both protocols."""
    async with RawHttpCaller(address.http) as over_http, GrpcCaller(address.grpc, GRPC_CHANNELS) as over_grpc:
        yield {"HTTP": over_http, "gRPC": over_grpc}


async def run_phase(address: Address, seconds: float, run: Callable[[Load], Awaitable[None]]) -> Phase:
    """Send requests in one way, and look before and after."""
    await until_zero(address.metrics)
    async with callers_to(address) as callers:
        reset_peaks(address.pid)
        before, looked = read_metrics(address.metrics), look_at(address.pid)
        load, cpu_s = Load(address, callers), time.process_time()
        await run(load)
        cpu_s = time.process_time() - cpu_s
        await until_zero(address.metrics)
        looks = (looked, look_at(address.pid))
        if looks[0][TRITON].pid != looks[1][TRITON].pid:
            raise RuntimeError("The server was started again while it was measured: is this machine busy?")
        return Phase(load.sent, seconds, before, read_metrics(address.metrics), looks, cpu_s)


async def measure_throughputs(
    address: Address, concurrencies: Sequence[int], seconds: float, seed: int
) -> dict[int, Phase]:
    """Find out how many requests are answered by how many callers, up to what is refused."""
    calls = iter(draw_calls(1.0, 100_000, seed))
    phases: dict[int, Phase] = {}
    for callers in concurrencies:
        run = functools.partial(closed_loop, calls=calls, concurrency=callers, seconds=seconds)
        phases[callers] = await run_phase(address, seconds, run)
        print(f"{callers} callers: {phases[callers].throughput:.2f} requests/s", flush=True)
    return phases


async def measure_overload(address: Address, rate: float, seconds: float, seed: int) -> Phase:
    """Offer so many requests per second."""
    calls = iter(draw_calls(rate, int(2 * rate * (RAMP_S + seconds)), seed))
    return await run_phase(address, seconds, lambda load: open_loop(load, calls, seconds))


async def measure_abandoned(address: Address, leave_after_s: float) -> tuple[float, Counter[str]]:
    """Send many requests with long texts, leave, and send a small one; again, where it is told to try again later.

    Returns:
        The seconds until that is answered, and how many of the others were answered before their callers left.
    """
    await until_zero(address.metrics)
    outcomes: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as leaving, callers_to(address) as staying:
        makers: tuple[Callable[[], Caller], ...] = (
            lambda: HttpCaller(address.http),
            lambda: GrpcCaller(address.grpc),
        )
        callers = [await leaving.enter_async_context(makers[n % 2]()) for n in range(NUM_LONG)]
        requests = [WireRequest(f"long-{leave_after_s}-{n}", LONG) for n in range(NUM_LONG)]
        pairs = zip(callers, requests, strict=True)
        tasks = [asyncio.create_task(caller.send(request)) for caller, request in pairs]
        await asyncio.sleep(leave_after_s)
        outcomes.update(task.result().outcome if task.done() else "left" for task in tasks)
        for task in tasks:
            task.cancel()
        start = time.perf_counter()
        small = asyncio.create_task(_send_until_let_in(staying["gRPC"]))
        await asyncio.gather(leaving.aclose(), *tasks, return_exceptions=True)
        answer = await small
        seconds = time.perf_counter() - start
    if answer.outcome != OK:
        raise RuntimeError(f"The small request was not answered: {answer.sentence}")
    return seconds, outcomes


async def _send_until_let_in(caller: Caller) -> Answer:
    for _ in range(MOST_TRIES):
        answer = await caller.send(WireRequest("small", SMALL))
        if answer.outcome != "UNAVAILABLE":
            break
        await asyncio.sleep(TRY_AGAIN_S)
    return answer


def percentiles(values: list[float]) -> list[float]:
    """Return those that the tables have."""
    return [float(np.percentile(values, percentile)) for percentile in PERCENTILES] if values else []


def tabulate_throughputs(report: Report, phases: dict[int, Phase], overload: Phase, rate: float) -> None:
    """Add what was answered, by how it was asked for."""
    best = max(phases.values(), key=lambda phase: phase.throughput)
    rows = [(f"{callers} callers", phase) for callers, phase in phases.items()]
    rows.append((f"{rate:.1f} requests offered per second", overload))
    report.add(
        Table(
            f"Requests that are answered ({MIX})",
            ("", "throughput", "of the best", "steps x seconds of audio, per second", "of the best", "refused"),
            tuple(
                (
                    name,
                    f"{phase.throughput:.2f} requests/s",
                    f"{phase.throughput / best.throughput:.2f}",
                    f"{phase.work:.1f}",
                    f"{phase.work / best.work:.2f}",
                    f"{sum(sent.outcome == 'UNAVAILABLE' for sent in phase.sent)} of {len(phase.sent)}",
                )
                for name, phase in rows
            ),
            note=f"Each for {overload.seconds:g} s, after {RAMP_S:g} s that aren't counted. Half of the requests go "
            "over HTTP, half over gRPC. What sends them runs on the same processor.",
        )
    )
    report.measurements["throughputs"] = {
        name: {"requests_per_s": phase.throughput, "work_per_s": phase.work} for name, phase in rows
    }
    report.measurements["of the best"] = overload.throughput / best.throughput


def tabulate_refusals(report: Report, overload: Phase) -> None:
    """Add what refusals take, and what they cost."""
    rows, lags = [], percentiles([sent.lag_s for sent in overload.sent])
    for protocol in PROTOCOLS:
        if latencies := percentiles([sent.seconds for sent in overload.refusals(protocol)]):
            rows.append(
                (
                    protocol,
                    str(len(overload.refusals(protocol))),
                    *(f"{seconds * 1000:.1f} ms" for seconds in latencies),
                )
            )
            report.measurements[f"refusals over {protocol}"] = dict(
                zip([f"p{percentile}" for percentile in PERCENTILES], latencies, strict=True)
            )
    report.add(
        Table(
            "Refusals",
            ("", "n", *(f"p{percentile}" for percentile in PERCENTILES)),
            tuple(rows),
            note="From the planned arrival to the answer; of that, the process that sends was late by "
            f"{lags[0] * 1000:.1f} ms (p99 {lags[-1] * 1000:.1f} ms).",
        )
    )
    outcomes = Counter(sent.outcome for sent in overload.sent)
    report.measurements["outcomes"] = dict(outcomes)
    report.add(
        Table(
            "What the stages did for them",
            ("stage", "requests beyond those answered", "executions", "answered"),
            tuple(
                (model, str(overload.beyond(model)), str(overload.executions(model)), str(outcomes[OK]))
                for model in STAGES
            ),
            note=f"By Triton's own metrics. The tokenizer decides; nothing behind it should see a refused request. "
            f"Outcomes: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.most_common())}.",
        )
    )
    report.measurements["beyond those answered"] = {model: overload.beyond(model) for model in STAGES}


def tabulate_processes(report: Report, overload: Phase) -> None:
    """Add memory and processor time of each process."""
    before, after = overload.looks
    requests = len(overload.sent)
    report.add(
        Table(
            "Processes",
            ("process", "memory before", "at most", "after", "processor time", "of it per request"),
            tuple(
                (
                    name,
                    f"{look.rss_mib:.0f} MiB",
                    f"{after[name].peak_rss_mib:.0f} MiB",
                    f"{after[name].rss_mib:.0f} MiB",
                    f"{overload.cpu_s(name):.1f} s",
                    f"{overload.cpu_s(name) / requests * 1000:.2f} ms",
                )
                for name, look in before.items()
                if name in after
            ),
            note="Resident memory. All requests count, the refused ones too. What sends them took "
            f"{overload.callers_cpu_s:.1f} s, {overload.callers_cpu_s / requests * 1000:.2f} ms per request, "
            "of the same processor.",
        )
    )
    report.measurements["processor time in s"] = {name: overload.cpu_s(name) for name in before}
    report.measurements["processor time of the callers, in s"] = overload.callers_cpu_s
    report.measurements["memory at most, in MiB"] = {name: look.peak_rss_mib for name, look in after.items()}


def tabulate_abandoned(report: Report, runs: dict[float, list[tuple[float, Counter[str]]]]) -> None:
    """Add how long the small request took."""
    report.add(
        Table(
            f"{NUM_LONG} requests with 16 prompts of 512 tokens, whose callers leave",
            ("left after", "small request answered after", "of the long ones, before their callers left"),
            tuple(
                (
                    f"{leave_after_s:g} s",
                    str(Samples(tuple(seconds for seconds, _ in measured), "s")),
                    "; ".join(
                        ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
                        for _, outcomes in measured
                    ),
                )
                for leave_after_s, measured in runs.items()
            ),
            note="The callers close their connections, and cancel nothing. The small request is sent at that moment.",
        )
    )
    report.measurements["small request after the callers left, in s"] = {
        f"{leave_after_s:g}": [seconds for seconds, _ in measured] for leave_after_s, measured in runs.items()
    }


async def measure(arguments: argparse.Namespace, address: Address, report: Report) -> None:
    """Measure both parts."""
    await measure_overload(address, 2.0, 5.0, seed=1)  # warm up
    phases = await measure_throughputs(address, arguments.callers, arguments.seconds, seed=2)
    rate = OVERLOAD * max(phase.throughput for phase in phases.values())
    overload = await measure_overload(address, rate, arguments.seconds, seed=3)
    print(f"{rate:.1f} per second offered: {overload.throughput:.2f} requests/s", flush=True)
    tabulate_throughputs(report, phases, overload, rate)
    tabulate_refusals(report, overload)
    tabulate_processes(report, overload)
    runs: dict[float, list[tuple[float, Counter[str]]]] = {leave_after_s: [] for leave_after_s in LEAVE_AFTER_S}
    for _ in range(arguments.repeats):
        for leave_after_s, measured in runs.items():
            measured.append(await measure_abandoned(address, leave_after_s))
    tabulate_abandoned(report, runs)


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--callers", type=int, nargs="+", default=CONCURRENCIES, help="to find the best throughput")
    parser.add_argument("--repeats", type=int, default=3, help="of the second part")
    parser.add_argument("--repository", type=Path, help="an export that is there already")
    parser.add_argument("--dry-run", action="store_true", help="write no report")
    arguments = parser.parse_args()
    report = Report("overload", "Overload, demo size", "python -m benchmarks.overload")
    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        repository = arguments.repository or export_new_checkpoint(Path(folder))
        with ServerProcess(repository, Path(folder)) as server:
            asyncio.run(measure(arguments, server.address, report))
    if not arguments.dry_run:
        report.save()


if __name__ == "__main__":
    main()
