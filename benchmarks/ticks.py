"""What a step costs beside the UNet: the loop's own work, against that of diffusers' loop. The UNet answers at once.

`python -m benchmarks.ticks` from the repository's root needs torch, diffusers and numpy, and takes half a minute.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from denoising_errors import RequestCancelledError
from denoising_job import Job
from denoising_loop import DenoisingLoop
from denoising_request import DenoisingRequest, SchedulerRequest
from diffusers import DPMSolverMultistepScheduler
from loop_metrics import LoopMetrics
from noise_schedulers import NoiseSchedulers
from scheduler_steps import SchedulerSteps
from text_conditioning import Conditioning
from torch import Tensor
from unet_forward import UNetForward

from benchmarks.report import Report, Samples, Table
from export.demo_unet import LATENT_FRAMES_PER_S, TEXT_WIDTHS, scheduler_config

LENGTHS_S = (0.64, 2.56, 10.24)
REQUESTS = (1, 16)
STEPS = 200
"""Of a request: none ends while ticks are measured."""
GUIDANCE_SCALE = 3.5
TEXT_BUCKETS = (16, 512)
WARM_UP = 10


class InstantUNet:
    """Stands for the UNet; what it is asked for costs nothing, and is told beside."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seconds = 0.0

    def project(self, generated: Tensor, prompt: Tensor, mask: Tensor) -> Conditioning:
        """Return text of the official widths."""
        return Conditioning(generated.repeat(1, 1, 8), prompt.repeat(1, 1, 8), mask.float())

    def __call__(self, latents: Tensor, *_: object) -> Tensor:
        """Return some noise."""
        return latents


def our_ticks(requests: int, frames: int, repeats: int, *, one_leaves: bool) -> Iterator[float]:
    """Yield the seconds of ticks; before each, one request leaves and another comes, if it is to be so."""
    schedulers = SchedulerSteps(NoiseSchedulers(scheduler_config()))
    unet: UNetForward = InstantUNet()  # type: ignore[assignment]
    loop = DenoisingLoop(unet, 2 * requests * frames, TEXT_BUCKETS, LoopMetrics())

    def admit(seed: int) -> None:
        request = _request(frames, seed)
        loop.admit(Job(request, schedulers.create(request.scheduler)))

    for seed in range(requests):
        admit(seed)
    for number in range(WARM_UP + repeats):
        began = time.perf_counter()
        if one_leaves:
            loop.jobs[number % requests].abort(RequestCancelledError("it leaves"))
            admit(number)
        loop.tick()
        if number >= WARM_UP:
            yield time.perf_counter() - began


@torch.inference_mode()
def diffusers_steps(requests: int, frames: int, repeats: int) -> Iterator[float]:
    """Yield the seconds that AudioLDM2Pipeline's loop takes for a step of as many requests, one after the other."""
    states: list[tuple[DPMSolverMultistepScheduler, Tensor]] = []
    for seed in range(requests):
        scheduler = DPMSolverMultistepScheduler.from_config(scheduler_config())
        scheduler.set_timesteps(STEPS)
        states.append((scheduler, torch.randn(1, 8, frames, 16, generator=torch.Generator().manual_seed(seed))))
    for number in range(WARM_UP + repeats):
        began = time.perf_counter()
        for index, (scheduler, latents) in enumerate(states):
            timestep = scheduler.timesteps[number]
            noise_pred = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            unconditional, with_prompt = noise_pred.chunk(2)
            noise_pred = unconditional + GUIDANCE_SCALE * (with_prompt - unconditional)
            states[index] = (scheduler, scheduler.step(noise_pred, timestep, latents).prev_sample)
        if number >= WARM_UP:
            yield time.perf_counter() - began


def _request(frames: int, seed: int) -> DenoisingRequest:
    generator = torch.Generator().manual_seed(seed)
    generated, prompt = (
        torch.randn(2, tokens, width, generator=generator)
        for tokens, width in zip((8, 16), TEXT_WIDTHS["full"], strict=True)
    )
    return DenoisingRequest(
        generated,
        prompt,
        torch.ones(2, 16, dtype=torch.int64),
        (1, 8, frames, 16),
        GUIDANCE_SCALE,
        SchedulerRequest("DPMSolverMultistepScheduler", (), STEPS, 0.0, seed),
    )


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=180)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    report = Report("ticks", "A step beside the UNet", "python -m benchmarks.ticks")
    rows = []
    for length_s in LENGTHS_S:
        frames = round(length_s * LATENT_FRAMES_PER_S)
        for requests in REQUESTS:
            ways: dict[str, Callable[[], Iterator[float]]] = {
                "diffusers": lambda n=requests, f=frames: diffusers_steps(n, f, repeats),  # type: ignore[misc]
                "steady": lambda n=requests, f=frames: our_ticks(n, f, repeats, one_leaves=False),  # type: ignore[misc]
                "changing": lambda n=requests, f=frames: our_ticks(n, f, repeats, one_leaves=True),  # type: ignore[misc]
            }
            found = {name: Samples(tuple(1e6 * seconds for seconds in way()), "us") for name, way in ways.items()}
            for name, samples in found.items():
                report.measurements[f"{name}, {requests} requests, {length_s:g} s"] = samples.values
            ratio = found["steady"].median / found["diffusers"].median
            rows.append((f"{length_s:g} s", str(requests), *map(str, found.values()), f"{ratio:.2f}"))
    report.add(
        Table(
            "Microseconds of a step, the UNet's left out",
            (
                "length",
                "requests",
                "diffusers' loop",
                "a tick",
                "a tick before which one leaves and one comes",
                "ratio",
            ),
            tuple(rows),
            note="DPM++ with guidance, one thread; the ratio is that of a tick to diffusers' loop.",
        )
    )
    report.save()


if __name__ == "__main__":
    main()
