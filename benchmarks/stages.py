"""Every stage but the UNet in PyTorch, on the device at hand: eager fp32, half precision, compiled; with its error.

`python -m benchmarks.stages --size full`; it needs torch, diffusers and transformers, no server. Weights are random.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from benchmarks.report import Report, Samples, Table, measure
from export.checkpoint import Checkpoint
from export.demo import write_checkpoint
from export.demo_unet import LATENT_FRAMES_PER_S
from export.repository import ONNX_STAGES

NUM_TOKENS = 16
MEL_FRAMES_PER_LATENT_FRAME = 4
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def make_inputs(length_s: float, projected_width: int) -> dict[str, dict[str, Tensor]]:
    """Return the inputs of every stage for one request with guidance."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (2, NUM_TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    frames = round(length_s * LATENT_FRAMES_PER_S)
    return {
        "text_encoder": {
            "clap_input_ids": ids,
            "clap_attention_mask": mask,
            "t5_input_ids": ids,
            "t5_attention_mask": mask,
        },
        "gpt2": {
            "projected_prompt_embeds": torch.randn(2, NUM_TOKENS + 5, projected_width, generator=generator),
            "projected_attention_mask": torch.ones(2, NUM_TOKENS + 5, dtype=torch.int64),
        },
        "vae": {"latents": torch.randn(1, 8, frames, 16, generator=generator)},
        "vocoder": {"mel_spectrogram": torch.randn(1, MEL_FRAMES_PER_LATENT_FRAME * frames, 64, generator=generator)},
    }


def load_module(checkpoint: Checkpoint, stage: str) -> nn.Module:
    """Return the stage in PyTorch, as diffusers computes it."""
    described = ONNX_STAGES[stage](checkpoint)
    return described.reference if isinstance(described.reference, nn.Module) else described.module


def call(module: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return copies of the floating-point outputs: a compiled module may use their memory again."""
    outputs = module(**inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return tuple(output.clone() for output in outputs if output.is_floating_point())


def relative_rms(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest error of an output, ||actual - expected|| / ||expected||."""
    return max(
        float((got.float() - want.float()).norm() / want.float().norm())
        for got, want in zip(actual, expected, strict=True)
    )


@torch.inference_mode()
def measure_stage(
    module: nn.Module, inputs: Mapping[str, Tensor], device: torch.device, arguments: argparse.Namespace
) -> list[tuple[str, Samples, float]]:
    """Return the name, the time and the error against fp32 of each way to compute a stage."""
    dtype = DTYPES[arguments.dtype]
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    in_half = {name: t.to(dtype) if t.is_floating_point() else t for name, t in on_device.items()}

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()

    def timed(way: Callable[..., Tensor], given: Mapping[str, Tensor]) -> tuple[Samples, tuple[Tensor, ...]]:
        run = partial(call, way, given)
        return measure(run, clock, repeats=arguments.repeats, warm_up=2), run()

    samples, exact = timed(module.to(device), on_device)
    results = [("eager, fp32", samples, 0.0)]
    half = module.to(dtype)
    samples, outputs = timed(half, in_half)
    results.append((f"eager, {arguments.dtype}", samples, relative_rms(outputs, exact)))
    if arguments.compile:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        compiled = torch.compile(half, mode=mode, backend=arguments.compile)
        samples, outputs = timed(compiled, in_half)
        results.append((f"torch.compile ({mode}), {arguments.dtype}", samples, relative_rms(outputs, exact)))
    return results


def main() -> None:
    """Measure, and write the report."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("demo", "full"), default="full")
    parser.add_argument("--length", type=float, default=10.24, help="seconds of audio")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16" if on_gpu else "bf16")
    parser.add_argument("--repeats", type=int, default=10 if on_gpu else 5)
    parser.add_argument("--compile", default="inductor" if on_gpu else "", metavar="BACKEND", help="empty for eager")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    what = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    command = f"python -m benchmarks.stages --size {arguments.size} --dtype {arguments.dtype}"
    name = f"stages_{'gpu' if on_gpu else 'cpu'}_{arguments.dtype}"
    report = Report(name, f"The other stages on {what} in {arguments.dtype}", command)
    rows = []
    with tempfile.TemporaryDirectory(prefix="stages-") as folder:
        write_checkpoint(Path(folder), size=arguments.size)
        checkpoint = Checkpoint.find(folder)
        width = checkpoint.load("language_model").config.n_embd
        for stage, inputs in make_inputs(arguments.length, width).items():
            for way, samples, error in measure_stage(load_module(checkpoint, stage), inputs, device, arguments):
                rows.append((stage, way, str(samples), f"{error:.1e}"))
                report.measurements[f"{stage}, {way}"] = {"seconds": samples.values, "error": error}
                print(*rows[-1], flush=True)
    report.add(
        Table(
            f"One request with guidance ({arguments.size}, {arguments.length:g} s)",
            ("stage", "way", "time", "error against fp32"),
            tuple(rows),
            note="The error is a relative RMS, of the worst output.",
        )
    )
    report.save()


if __name__ == "__main__":
    main()
