"""The UNet on the CPU, against diffusers' own: eager, in half precision, compiled; checked against fp32.

`python -m benchmarks.unet` from the repository's root needs torch, diffusers, numpy and safetensors, no server and no
checkpoint: the weights are random. `--size demo --length 2.56` is quick. `benchmarks.gpu` is for GPUs.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from denoising_engine import DenoisingEngine
from denoising_request import DenoisingRequest, SchedulerRequest
from diffusers import AudioLDM2UNet2DConditionModel, DPMSolverMultistepScheduler
from loop_metrics import LoopMetrics
from noise_schedulers import NoiseSchedulers
from scheduler_steps import SchedulerSteps
from text_conditioning import Conditioning
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from unet_forward import UNetForward
from unet_shapes import AUTO, FixedShape, Preparation

from benchmarks.gpu.loops import committed_options
from benchmarks.new_process import in_new_process
from benchmarks.report import Report, Samples, Table, measure
from export.demo_unet import LATENT_FRAMES_PER_S, TEXT_WIDTHS, UNET_WIDTHS, make_unet, scheduler_config

NUM_TOKENS = 16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCHEDULER_CONFIG = scheduler_config()
CPU = torch.device("cpu")


class Bench:
    """One size of UNet, one length of audio, one type of half precision."""

    def __init__(self, size: str, length_s: float, dtype: torch.dtype, repeats: int) -> None:
        self.size, self.dtype, self.repeats = size, dtype, repeats
        self.length_s, self.frames = length_s, round(length_s * LATENT_FRAMES_PER_S)
        generator = torch.Generator().manual_seed(0)
        self.generated, self.prompt = (
            torch.randn(2, tokens, width, generator=generator)
            for tokens, width in zip((8, NUM_TOKENS), TEXT_WIDTHS[size], strict=True)
        )
        self.mask = torch.ones(2, NUM_TOKENS, dtype=torch.int64)
        self.latents = torch.randn(1, 8, self.frames, 16, generator=generator)

    def unet(self, dtype: torch.dtype) -> AudioLDM2UNet2DConditionModel:
        """Return diffusers' UNet, always with the same weights."""
        torch.manual_seed(0)
        unet = make_unet(*TEXT_WIDTHS[self.size], **UNET_WIDTHS[self.size])
        return unet.eval().requires_grad_(False).to(dtype)

    def ours(self, preparation: Preparation) -> UNetForward:
        """Return ours, with its fixed shapes prepared."""
        forward = UNetForward(self.unet(self.dtype), CPU, max_tokens=512)
        for shape, seconds in forward.prepare(preparation):
            print(f"prepared {shape} in {seconds:.1f} s", flush=True)
        return forward

    def rows(self, tensor: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """Return `tensor` repeated to that many rows."""
        repeated = tensor.repeat(math.ceil(rows / len(tensor)), *(1,) * (tensor.ndim - 1))[:rows]
        return repeated.to(dtype)

    def diffusers_step(self, unet: Callable[..., tuple[Tensor]], rows: int, dtype: torch.dtype) -> Tensor:
        """Do one forward as AudioLDM2Pipeline does it."""
        return unet(
            self.rows(self.latents, rows, dtype),
            torch.tensor(500),
            encoder_hidden_states=self.rows(self.generated, rows, dtype),
            encoder_hidden_states_1=self.rows(self.prompt, rows, dtype),
            encoder_attention_mask_1=self.rows(self.mask, rows, torch.int64),
            return_dict=False,
        )[0].clone()

    def our_inputs(self, forward: UNetForward, rows: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Return the inputs of the loop's forward."""
        text = (self.rows(self.generated, rows, self.dtype), self.rows(self.prompt, rows, self.dtype))
        conditioning = forward.project(*text, self.rows(self.mask, rows, torch.int64))
        timesteps = torch.full((rows,), 500.0)
        return self.rows(self.latents, rows, torch.float32), timesteps, conditioning

    @torch.inference_mode()
    def measure(self, function: Callable[[], Tensor], warm_up: int = 2) -> Samples:
        """Return the seconds of a call."""
        return measure(function, time.perf_counter, repeats=self.repeats, warm_up=warm_up)


def measure_steps(bench: Bench, preparation: Preparation, row_counts: list[int], report: Report) -> None:
    """The step alone: each way, each number of rows."""
    with torch.inference_mode():
        fp32 = bench.unet(torch.float32)
        reference = bench.diffusers_step(fp32, 2, torch.float32)
        half = bench.unet(bench.dtype)
        ways: dict[str, Callable[[int], Callable[[], Tensor]]] = {
            "diffusers, eager, fp32": lambda rows: partial(bench.diffusers_step, fp32, rows, torch.float32),
            f"diffusers, eager, {_name(bench.dtype)}": lambda rows: partial(
                bench.diffusers_step, half, rows, bench.dtype
            ),
        }
        if preparation.compile_backend:
            compiled = torch.compile(half, backend=preparation.compile_backend)
            ways[f"diffusers, torch.compile, {_name(bench.dtype)}"] = lambda rows: partial(
                bench.diffusers_step, compiled, rows, bench.dtype
            )
        ours = bench.ours(preparation)
        ways[f"this project, {_name(bench.dtype)}"] = lambda rows: partial(ours, *bench.our_inputs(ours, rows))
        flops = _flops(partial(bench.diffusers_step, fp32, 1, torch.float32))
        peak = _matrix_rate(bench)
        table = []
        first: dict[int, float] = {}
        for name, way in ways.items():
            error = float((way(2)().float() - reference).norm() / reference.norm())
            for rows in row_counts:
                samples = bench.measure(way(rows))
                first.setdefault(rows, samples.median)
                rate = flops * rows / samples.median / 1e12
                report.measurements[f"step, {name}, {rows} rows"] = samples.values
                table.append(
                    (
                        name,
                        str(rows),
                        str(samples),
                        f"{first[rows] / samples.median:.2f}",
                        f"{rate:.2f}",
                        f"{100 * rate * 1e12 / peak:.0f} %",
                        f"{error:.1e}",
                    )
                )
    report.add(
        Table(
            f"One step of the UNet ({bench.size}, {bench.length_s:g} s)",
            ("way", "rows", "time", "faster than eager fp32", "TFLOP/s", "of the matrix rate", "error against fp32"),
            tuple(table),
            note=f"{flops / 1e9:.0f} GFLOP per row; a large matrix product in {_name(bench.dtype)} reached "
            f"{peak / 1e12:.2f} TFLOP/s here. The error is a relative RMS, of two rows.",
        )
    )


def measure_loop(bench: Bench, preparation: Preparation, steps: int, request_counts: list[int], report: Report) -> None:
    """The whole loop of one request, and of several together; each way in a process of its own.

    In one process, the threads that OpenMP keeps for one way would slow down the other's.
    """
    ways = {
        f"diffusers, eager, {_name(dtype)}": (1, partial(_time_diffusers_loop, bench, dtype, steps))
        for dtype in dict.fromkeys((torch.float32, bench.dtype))
    } | {
        f"this project, {_name(bench.dtype)}" + " " * index: (n, partial(_time_our_loop, bench, preparation, n, steps))
        for index, n in enumerate(request_counts)
    }
    rows = []
    eager = one = 0.0
    for name, (requests, way) in ways.items():
        samples = in_new_process(way)
        eager = eager or samples.median
        one = one or (samples.median if name.startswith("this") else 0.0)
        report.measurements[f"loop, {name.strip()}, {requests} requests"] = samples.values
        clips_per_s = requests / samples.median
        against_one = f"{clips_per_s * one:.2f}" if one else ""
        rows.append((name.strip(), str(requests), str(samples), f"{clips_per_s * eager:.2f}", against_one))
    report.add(
        Table(
            f"The loop of {steps} DPM++ 2M steps with guidance ({bench.size}, {bench.length_s:g} s)",
            ("way", "requests at once", "time", "clips per second against eager fp32", "against one request"),
            tuple(rows),
        )
    )


def _time_diffusers_loop(bench: Bench, dtype: torch.dtype, steps: int) -> Samples:
    unet = bench.unet(dtype)
    return bench.measure(partial(_diffusers_loop, bench, unet, dtype, steps), warm_up=1)


def _time_our_loop(bench: Bench, preparation: Preparation, requests: int, steps: int) -> Samples:
    schedulers = SchedulerSteps(NoiseSchedulers(SCHEDULER_CONFIG))
    options = committed_options(AUTO, Preparation())
    with DenoisingEngine(lambda: bench.ours(preparation), schedulers, options, LoopMetrics()) as engine:
        return bench.measure(partial(_our_loop, bench, engine, requests, steps), warm_up=1)


def _diffusers_loop(bench: Bench, unet: AudioLDM2UNet2DConditionModel, dtype: torch.dtype, steps: int) -> Tensor:
    scheduler = DPMSolverMultistepScheduler.from_config(SCHEDULER_CONFIG)
    scheduler.set_timesteps(steps)
    latents = bench.rows(bench.latents, 1, dtype)
    text = [bench.rows(tensor, 2, dtype) for tensor in (bench.generated, bench.prompt)]
    mask = bench.rows(bench.mask, 2, torch.int64)
    for timestep in scheduler.timesteps:
        noise_pred = unet(
            scheduler.scale_model_input(torch.cat([latents] * 2), timestep),
            timestep,
            encoder_hidden_states=text[0],
            encoder_hidden_states_1=text[1],
            encoder_attention_mask_1=mask,
            return_dict=False,
        )[0]
        unconditional, with_prompt = noise_pred.chunk(2)
        noise_pred = unconditional + 3.5 * (with_prompt - unconditional)
        latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
    return latents


def _our_loop(bench: Bench, engine: DenoisingEngine, requests: int, steps: int) -> Tensor:
    futures = [
        engine.submit(
            DenoisingRequest(
                bench.generated,
                bench.prompt,
                bench.mask,
                (1, 8, bench.frames, 16),
                3.5,
                SchedulerRequest("DPMSolverMultistepScheduler", (), steps, 0.0, seed),
            )
        )
        for seed in range(requests)
    ]
    return torch.cat([future.result() for future in futures])


def _flops(function: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _matrix_rate(bench: Bench) -> float:
    """Return the FLOP/s of a large matrix product."""
    size = 2048
    left, right = (torch.randn(size, size).to(bench.dtype) for _ in range(2))
    samples = measure(lambda: left @ right, time.perf_counter, repeats=10, warm_up=3)
    return 2 * size**3 / min(samples.values)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=UNET_WIDTHS, default="full")
    parser.add_argument("--length", type=float, default=10.24, help="seconds of audio")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rows", type=int, nargs="+", default=[2])
    parser.add_argument("--requests", type=int, nargs="+", default=[1], help="at once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", default="", metavar="BACKEND", help="empty for eager")
    parser.add_argument("--name", default="unet_cpu", help="of the JSON file")
    arguments = parser.parse_args()
    bench = Bench(arguments.size, arguments.length, DTYPES[arguments.dtype], arguments.repeats)
    fixed = tuple(FixedShape(rows, bench.frames, NUM_TOKENS) for rows in sorted({2, *arguments.rows}))
    preparation = Preparation(arguments.compile, fixed_shapes=fixed if arguments.compile else ())
    report = Report(
        arguments.name,
        f"The UNet on CPU in {arguments.dtype}",
        f"python -m benchmarks.unet --size {arguments.size} --dtype {arguments.dtype} --steps {arguments.steps}",
    )
    measure_steps(bench, preparation, arguments.rows, report)
    measure_loop(bench, preparation, arguments.steps, arguments.requests, report)
    report.save()


if __name__ == "__main__":
    main()
