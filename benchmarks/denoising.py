"""Continuous batching: what it gives, on the demo checkpoint and on a UNet whose overhead dominates.

`python -m benchmarks.denoising`; about ten minutes, most of it for 4 x 150 s.
"""

import argparse
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import tritonclient.grpc
from denoising_engine import DenoisingEngine
from denoising_request import DenoisingRequest, SchedulerRequest
from diffusers import AudioLDM2UNet2DConditionModel
from loop_metrics import LoopMetrics
from noise_schedulers import NoiseSchedulers
from scheduler_steps import SchedulerSteps
from unet_forward import UNetForward

from benchmarks.new_process import in_new_process
from benchmarks.report import Report, Samples, Table
from export.demo import write_checkpoint
from export.demo_unet import LATENT_FRAMES_PER_S
from server import EmbeddedServer
from tests.helpers.tiny_unet import (
    make_options,
    make_request,
    make_unet,
    relative_rms,
    unet_inputs,
    write_unet_repository,
)

CPU = torch.device("cpu")

EIGHT_KINDS = (
    ("DPMSolverMultistepScheduler", 50, 3.5, 16),
    ("DDIMScheduler", 40, None, 5),
    ("UniPCMultistepScheduler", 20, 7.0, 30),
    ("EulerAncestralDiscreteScheduler", 25, 3.5, 9),
    ("PNDMScheduler", 10, None, 3),
    ("EulerDiscreteScheduler", 30, 2.0, 12),
    ("HeunDiscreteScheduler", 15, 3.5, 20),
    ("DPMSolverSDEScheduler", 12, 5.0, 7),
)
"""Scheduler, steps, guidance, T5 tokens."""


class Engine:
    """The engine over a checkpoint, and requests for it."""

    def __init__(self, checkpoint: Path) -> None:
        config = AudioLDM2UNet2DConditionModel.load_config(checkpoint / "unet")
        _, self._generated_width, self._prompt_width = config["cross_attention_dim"][0]
        schedulers = NoiseSchedulers.load(checkpoint / "scheduler" / "scheduler_config.json")
        self.metrics = LoopMetrics()
        self._engine = DenoisingEngine(
            lambda: UNetForward.load(checkpoint / "unet", CPU, 512, None),
            SchedulerSteps(schedulers),
            make_options(),
            self.metrics,
        )
        self.submit, self.close = self._engine.submit, self._engine.close

    def request(
        self, scheduler: str, steps: int, guidance: float | None, tokens: int, *, length_s: float, waveforms: int = 1
    ) -> DenoisingRequest:
        """Return a request with random text."""
        generator = torch.Generator().manual_seed(tokens)
        rows = 1 if guidance is None else 2
        return DenoisingRequest(
            generated_prompt_embeds=torch.randn(rows, 8, self._generated_width, generator=generator),
            prompt_embeds=torch.randn(rows, tokens, self._prompt_width, generator=generator),
            attention_mask=torch.ones(rows, tokens, dtype=torch.int64),
            latents_shape=(waveforms, 8, round(length_s * LATENT_FRAMES_PER_S), 16),
            guidance_scale=guidance,
            scheduler=SchedulerRequest(scheduler, (), steps, 0.0, seed=tokens),
        )

    def seconds(self, request: DenoisingRequest) -> float:
        """Return how long the request takes."""
        start = time.perf_counter()
        self.submit(request).result()
        return time.perf_counter() - start


def measure_company(engine: Engine, report: Report) -> None:
    """Eight different requests of one length, alone and together."""
    requests = [engine.request(*kind, length_s=2.56) for kind in EIGHT_KINDS]
    engine.metrics.take()
    solo, solo_forwards = [], []
    start = time.perf_counter()
    for request in requests:
        solo.append(engine.submit(request).result())
        solo_forwards.append(len(engine.metrics.take().rows_of_forwards))
    solo_s = time.perf_counter() - start
    start = time.perf_counter()
    together = [future.result() for future in [engine.submit(request) for request in requests]]
    together_s = time.perf_counter() - start
    forwards = len(engine.metrics.take().rows_of_forwards)
    worst = max(relative_rms(a, b) for a, b in zip(together, solo, strict=True))
    report.measurements["company"] = {
        "solo_forwards": solo_forwards,
        "forwards": forwards,
        "solo_s": solo_s,
        "together_s": together_s,
        "worst_error": worst,
    }
    report.add(
        Table(
            "Eight requests of 2.56 s with eight schedulers, step counts, guidances and text lengths",
            ("", "one after the other", "together", "ratio"),
            (
                (
                    "UNet forwards",
                    f"{sum(solo_forwards)}",
                    f"{forwards}",
                    f"{forwards / max(solo_forwards):.2f} x the longest's",
                ),
                ("time", f"{solo_s:.1f} s", f"{together_s:.1f} s", f"{solo_s / together_s:.2f} times faster"),
                ("worst relative RMS against alone", "", f"{worst:.1e}", ""),
            ),
        )
    )


def measure_fairness(engine: Engine, report: Report, repeats: int) -> None:
    """A short request beside one of 200 steps."""
    rows = []
    for title, long_s, short_s in (("same length", 2.56, 2.56), ("another length", 5.12, 2.56)):
        short = engine.request("DPMSolverMultistepScheduler", 10, 3.5, 9, length_s=short_s)
        solo = Samples(tuple(engine.seconds(short) for _ in range(repeats)), "s")
        running = engine.submit(engine.request("DDIMScheduler", 200, 3.5, 9, length_s=long_s))
        beside: list[float] = []
        while len(beside) < repeats and not running.done():
            beside.append(engine.seconds(short))
        running.result()
        company = Samples(tuple(beside), "s")
        ratio = company.median / solo.median
        report.measurements[f"fairness, {title}"] = {"solo": solo.values, "beside": company.values}
        rows.append((title, f"{short_s:g} s beside {long_s:g} s", str(solo), str(company), f"{ratio:.2f}"))
    report.add(
        Table(
            "A request of 10 steps beside one of 200 steps",
            ("", "audio", "alone", "beside", "ratio"),
            tuple(rows),
        )
    )


def measure_memory(engine: Engine, report: Report) -> None:
    """Four candidates of 150 s at the default budget."""
    engine.seconds(engine.request("DDIMScheduler", 1, 3.5, 16, length_s=0.64))
    idle = _memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    engine.metrics.take()
    seconds = engine.seconds(engine.request("DDIMScheduler", 2, 3.5, 16, length_s=150.0, waveforms=4))
    peak = _memory_mib("VmHWM")
    forwards = len(engine.metrics.take().rows_of_forwards)
    report.measurements["memory"] = {"idle_mib": idle, "peak_mib": peak, "seconds": seconds, "forwards": forwards}
    report.add(
        Table(
            "4 candidates of 150 s, 2 steps, with guidance: memory of the process that runs the UNet",
            ("idle", "peak above idle", "forwards", "time"),
            ((f"{idle:.0f} MiB", f"{peak - idle:.0f} MiB", f"{forwards}", f"{seconds:.0f} s"),),
        )
    )


def measure_throughput(report: Report, repeats: int) -> None:
    """Clients over gRPC against a tiny UNet."""
    parameters = sum(parameter.numel() for parameter in make_unet().parameters())
    per_client: dict[int, Samples] = {}
    with _serve_tiny_unet() as server:
        for clients in (1, 2, 4, 8):
            rates = [_requests_per_s(server, clients) for _ in range(repeats)]
            per_client[clients] = Samples(tuple(rates), "requests/s")
    report.measurements["throughput"] = {clients: rates.values for clients, rates in per_client.items()}
    alone = per_client[1].median
    report.add(
        Table(
            f"Clients over gRPC against the model `unet` with a UNet of {parameters:,} parameters",
            ("clients", "throughput", "ratio"),
            tuple((str(n), str(rates), f"{rates.median / alone:.2f}") for n, rates in per_client.items()),
            note="20 steps, 0.64 s, guidance. So small that the time of a forward is the overhead of its operations.",
        )
    )


def measure_overload(report: Report) -> None:
    """64 requests at once, for a queue of 16."""
    answers: queue.Queue[tuple[float, object]] = queue.Queue()

    def callback(sent: float) -> Callable[[object, object], None]:
        def note(result: object, error: object) -> None:  # noqa: ARG001 - tritonclient passes both by name
            answers.put((time.perf_counter() - sent, error))

        return note

    with (
        _serve_tiny_unet(max_queue_size=16, max_rows=2) as server,
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as client,
    ):
        inputs = unet_inputs(make_request(steps=20))
        client.infer("unet", inputs)
        for _ in range(64):
            client.async_infer("unet", inputs, callback(time.perf_counter()))
        received = [answers.get(timeout=120) for _ in range(64)]
    refusals = Samples(tuple(seconds * 1000 for seconds, error in received if error), "ms")
    successes = 64 - len(refusals.values)
    report.measurements["overload"] = {"successes": successes, "refusals_ms": refusals.values}
    report.add(
        Table(
            "64 requests at once for a queue of 16 and rows for one",
            ("successes", "refused with UNAVAILABLE", "the slowest refusal after"),
            ((str(successes), str(len(refusals.values)), f"{max(refusals.values):.0f} ms"),),
        )
    )


@contextmanager
def _serve_tiny_unet(**options: int) -> Iterator[EmbeddedServer]:
    with tempfile.TemporaryDirectory() as folder:
        repository = write_unet_repository(Path(folder) / "models", **options)
        with EmbeddedServer(repository) as server:
            yield server


def _requests_per_s(server: EmbeddedServer, clients: int) -> float:
    per_client = 6
    inputs = unet_inputs(make_request(steps=20))
    barrier = threading.Barrier(clients + 1)

    def call() -> None:
        with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
            client.infer("unet", inputs)
            barrier.wait()
            for _ in range(per_client):
                client.infer("unet", inputs)

    with ThreadPoolExecutor(clients) as threads:
        calls = [threads.submit(call) for _ in range(clients)]
        barrier.wait()
        start = time.perf_counter()
        for done in calls:
            done.result()
        return clients * per_client / (time.perf_counter() - start)


def _memory_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def main() -> None:
    """Measure everything, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    report = Report("denoising", "Continuous batching", "python -m benchmarks.denoising")
    measure_throughput(report, arguments.repeats)
    measure_overload(report)
    with tempfile.TemporaryDirectory(prefix="denoising-") as name:
        in_new_process(write_checkpoint, Path(name) / "checkpoint")
        engine = Engine(Path(name) / "checkpoint")
        measure_company(engine, report)
        measure_fairness(engine, report, arguments.repeats)
        measure_memory(engine, report)
        engine.close()
    report.save()


if __name__ == "__main__":
    main()
