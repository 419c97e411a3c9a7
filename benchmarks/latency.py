"""One request at a time: the served ensemble against `AudioLDM2Pipeline` in-process, with the same weights.

`python -m benchmarks.latency --size full`; about a quarter of an hour, 14 GB of disk and 16 GB of memory. Diffusers and
servers take turns.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from audioldm2_client import AudioLDM2Client
from diffusers import AudioLDM2Pipeline, DPMSolverMultistepScheduler

from benchmarks.report import Report, Samples, Table
from export.checkpoint import Checkpoint
from export.demo import write_checkpoint
from export.manifest import manifest_path
from export.model_names import ModelNames
from export.pytorch_files import write_unet_files
from export.repository import export_checkpoint
from server import EmbeddedServer

PROMPT, NEGATIVE_PROMPT = "a dog barking in the rain, thunder in the distance", "low quality"
STAGES = ("tokenizer", "text_encoder", "gpt2", "unet", "vae", "vocoder", "postprocess")


class Diffusers:
    """The reference pipeline, with the seconds of its parts."""

    def __init__(self, checkpoint: Path) -> None:
        self._pipeline = AudioLDM2Pipeline.from_pretrained(checkpoint, low_cpu_mem_usage=False)
        self._pipeline.scheduler = DPMSolverMultistepScheduler.from_config(self._pipeline.scheduler.config)
        self._pipeline.set_progress_bar_config(disable=True)
        self._seconds: dict[str, float] = defaultdict(float)
        self._time(self._pipeline, "encode_prompt", "text_encoder and gpt2")
        self._time(self._pipeline.unet, "forward", "unet")
        self._time(self._pipeline.vae, "decode", "vae")
        self._time(self._pipeline.vocoder, "forward", "vocoder")

    def generate(self, length_s: float, steps: int, prompt: str = PROMPT) -> dict[str, float]:
        """Generate once; return the seconds of each part and of the whole."""
        self._seconds.clear()
        start = time.perf_counter()
        self._pipeline(
            prompt,
            negative_prompt=NEGATIVE_PROMPT,
            audio_length_in_s=length_s,
            num_inference_steps=steps,
            guidance_scale=3.5,
            generator=torch.Generator("cpu").manual_seed(0),
        )
        return {**self._seconds, "total": time.perf_counter() - start}

    def _time(self, owner: Any, method: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                self._seconds[name] += time.perf_counter() - start

        setattr(owner, method, timed)


class Served:
    """An embedded server with a client, and the seconds of its stages from Triton's statistics."""

    def __init__(self, repository: Path, stack: ExitStack) -> None:
        self._server = stack.enter_context(EmbeddedServer(repository, expose_internals=True))
        self._client = stack.enter_context(AudioLDM2Client(self._server.grpc_url))

    def generate(self, length_s: float, steps: int) -> dict[str, float]:
        """Generate once; return the seconds of each stage and of the whole."""
        before = stage_seconds(self._server)
        start = time.perf_counter()
        self._client.generate(
            PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
            audio_length_in_s=length_s,
            num_inference_steps=steps,
            guidance_scale=3.5,
            seed=0,
        )
        total = time.perf_counter() - start
        time.sleep(0.2)  # the loop publishes its seconds from time to time
        after = stage_seconds(self._server)
        return {**{stage: after[stage] - before[stage] for stage in STAGES}, "total": total}


def stage_seconds(server: EmbeddedServer) -> dict[str, float]:
    """Return what each stage has computed so far, by its name: Triton's statistics, and for the UNet its forwards."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/stats") as response:
        models = json.load(response)["model_stats"]
    seconds = {model["name"]: model["inference_stats"]["compute_infer"]["ns"] / 1e9 for model in models}
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics") as response:
        for line in response.read().decode().splitlines():
            if line.startswith("audioldm2_unet_seconds_per_forward_sum"):
                seconds["unet"] = float(line.rsplit(" ", 1)[1])
    return seconds


def prepare(folder: Path, size: str, precisions: list[str]) -> tuple[Path, dict[str, Path]]:
    """Write the checkpoint for diffusers, and a model repository for each precision; return where they are."""
    checkpoint, lm_head = folder / "checkpoint", folder / "lm_head"
    write_checkpoint(checkpoint, size=size)
    write_checkpoint(lm_head, size=size, language_model="GPT2LMHeadModel")
    exact = folder / "fp32"
    export_checkpoint(Checkpoint.find(str(checkpoint)), exact, on_start=print, on_done=lambda *_: None)
    repositories = {}
    for precision in precisions:
        repositories[precision] = folder / precision
        if precision != "fp32":
            shutil.copytree(exact, repositories[precision], copy_function=os.link)
            shutil.rmtree(repositories[precision] / "unet/1/unet")
            shutil.rmtree(repositories[precision] / "unet/1/scheduler")
            write_unet_files(Checkpoint.find(str(checkpoint)), repositories[precision] / "unet/1", precision)
            manifest_path(repositories[precision], ModelNames()).unlink()  # it is that of the other UNet
    shutil.rmtree(checkpoint)
    return lm_head, repositories


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Let diffusers and every server generate in turns; return the seconds of each time."""
    lm_head, repositories = prepare(folder, arguments.size, arguments.precisions)
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    with ExitStack() as stack:
        ways: dict[str, Any] = {"diffusers": Diffusers(lm_head)}
        ways |= {f"served, {name} UNet": Served(repository, stack) for name, repository in repositories.items()}
        for way in ways.values():
            way.generate(arguments.length, 2)  # warm up
        for repeat in range(arguments.repeats):
            for name, way in ways.items():
                runs[name].append(way.generate(arguments.length, arguments.steps))
                print(f"{repeat + 1}/{arguments.repeats} {name}: {runs[name][-1]['total']:.2f} s", flush=True)
    return runs


def tabulate(runs: dict[str, list[dict[str, float]]], arguments: argparse.Namespace, report: Report) -> None:
    """Add the totals, and where they come from."""
    totals = {name: Samples(tuple(run["total"] for run in way), "s") for name, way in runs.items()}
    others = {name: Samples(tuple(run["total"] - run["unet"] for run in way), "s") for name, way in runs.items()}
    reference, other_reference = totals["diffusers"].median, others["diffusers"].median
    what = f"{arguments.size}, {arguments.length:g} s, {arguments.steps} DPM++ 2M steps, guidance"
    report.add(
        Table(
            f"One request ({what})",
            ("", "total", "of diffusers'", "all but the UNet", "of diffusers'"),
            tuple(
                (
                    name,
                    str(totals[name]),
                    f"{totals[name].median / reference:.2f}",
                    str(others[name]),
                    f"{others[name].median / other_reference:.2f}",
                )
                for name in runs
            ),
        )
    )
    parts = {name: {part: median(run[part] for run in way) for part in way[0]} for name, way in runs.items()}
    for part in parts.values():
        part["everything else"] = part["total"] - sum(value for name, value in part.items() if name != "total")
    rows = dict.fromkeys(name for part in parts.values() for name in part)
    ordered = [name for name in rows if name not in ("everything else", "total")] + ["everything else", "total"]
    report.add(
        Table(
            f"Where the time goes ({what})",
            ("", *runs),
            tuple((row, *(_seconds(parts[name].get(row)) for name in runs)) for row in ordered),
            note="Medians. Served stages are Triton's compute times, the UNet's is that of its forwards and steps; "
            "what is left is Triton, copies between stages, and the client.",
        )
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} s"


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("demo", "full"), default="demo")
    parser.add_argument("--length", type=float, default=10.24, help="seconds of audio")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], help="of the UNet, fp32 the first")
    parser.add_argument("--name", default="", help="of the JSON file")
    arguments = parser.parse_args()
    command = f"python -m benchmarks.latency --size {arguments.size} --length {arguments.length:g}"
    name = arguments.name or f"latency_{arguments.size}_{arguments.length:g}s"
    report = Report(name, f"Latency, {arguments.size} size, {arguments.length:g} s", command)
    with tempfile.TemporaryDirectory(prefix="latency-") as folder:
        runs = measure(Path(folder), arguments)
    report.measurements.update(runs)
    tabulate(runs, arguments, report)
    report.save()


if __name__ == "__main__":
    main()
