"""The two loops that are compared, over the same UNet, text and noise: diffusers' own, and this project's engine."""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from config_parameters import ConfigParameters
from denoising_engine import DenoisingEngine
from denoising_request import DenoisingRequest, SchedulerRequest
from device_defaults import GRAPH_TOKENS
from diffusers import AudioLDM2UNet2DConditionModel, DPMSolverMultistepScheduler
from loop_metrics import LoopMetrics
from loop_options import LoopOptions
from noise_schedulers import NoiseSchedulers
from prepared_unet import PreparedUNet
from scheduler_steps import SchedulerSteps, initial_noise
from tick_graphs import TickGraphs
from torch import Tensor
from unet_forward import UNetForward
from unet_shapes import AUTO, NUM_VECTORS, FixedShape, Preparation

from benchmarks.gpu.case import Case
from export.demo_unet import TEXT_WIDTHS

GUIDANCE_SCALE = 3.5
CONFIG = Path(__file__).resolve().parents[2] / "model_repository" / "unet" / "config.pbtxt"


@dataclass(frozen=True)
class Text:
    """The text of a request, on the CPU: without guidance the last row alone."""

    generated: Tensor
    prompt: Tensor
    mask: Tensor

    @classmethod
    def random(cls, case: Case, *, guided: bool) -> "Text":
        """Return a negative prompt's states and a prompt's, always the same ones."""
        generator = torch.Generator().manual_seed(1)
        widths = TEXT_WIDTHS[case.size]
        generated, prompt = (
            torch.randn(2, tokens, width, generator=generator)
            for tokens, width in zip((NUM_VECTORS, case.tokens), widths, strict=True)
        )
        mask = torch.ones(2, case.tokens, dtype=torch.int64)
        rows = slice(0, 2) if guided else slice(1, 2)
        return cls(generated[rows].clone(), prompt[rows].clone(), mask[rows].clone())


class DiffusersLoop:
    """The denoising loop of `AudioLDM2Pipeline`, with everything on the device before it begins.

    Args:
        case: What is measured.
        unet: Eager or compiled.
        dtype: Of latents and text.
        guided: Whether there are two rows for each waveform.
        requests: Waveforms of its batch, with the seeds 0, 1, ...
        steps: The case's if None.
    """

    def __init__(
        self,
        case: Case,
        unet: Callable[..., tuple[Tensor]],
        dtype: torch.dtype,
        *,
        guided: bool,
        requests: int = 1,
        steps: int | None = None,
    ) -> None:
        self._unet, self._guided, self._device = unet, guided, torch.device(case.device)
        self._steps = steps or case.steps
        text = Text.random(case, guided=guided)
        self._generated, self._prompt, self._mask = (
            tensor.repeat_interleave(requests, dim=0).to(self._device, dtype if tensor.is_floating_point() else None)
            for tensor in (text.generated, text.prompt, text.mask)
        )
        config = json.loads((case.scheduler_folder / "scheduler_config.json").read_text())
        self._scheduler = DPMSolverMultistepScheduler.from_config(config)
        noise = [initial_noise((1, 8, case.frames, 16), torch.Generator().manual_seed(n)) for n in range(requests)]
        self._noise = (torch.cat(noise) * self._scheduler.init_noise_sigma).to(self._device, dtype)
        self.prepare()

    def prepare(self) -> None:
        """Begin anew: what a pipeline does before its loop, outside of the clock."""
        self._scheduler.set_timesteps(self._steps, device=self._device)

    def prepare_and_run(self) -> Tensor:
        """Do both."""
        self.prepare()
        return self()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the latents; they are on the device."""
        latents = self._noise
        for timestep in self._scheduler.timesteps:
            sample = torch.cat([latents] * 2) if self._guided else latents
            noise_pred = self._unet(
                self._scheduler.scale_model_input(sample, timestep),
                timestep,
                encoder_hidden_states=self._generated,
                encoder_hidden_states_1=self._prompt,
                encoder_attention_mask_1=self._mask,
                return_dict=False,
            )[0]
            if self._guided:
                unconditional, with_prompt = noise_pred.chunk(2)
                noise_pred = unconditional + GUIDANCE_SCALE * (with_prompt - unconditional)
            latents = self._scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
        return latents


def load_diffusers_unet(case: Case, dtype: torch.dtype) -> AudioLDM2UNet2DConditionModel:
    """Return diffusers' UNet on the device."""
    unet = AudioLDM2UNet2DConditionModel.from_pretrained(
        case.unet_folder, local_files_only=True, low_cpu_mem_usage=False, torch_dtype=dtype
    )
    return unet.eval().requires_grad_(False).to(case.device)


def compile_diffusers_unet(case: Case, unet: AudioLDM2UNet2DConditionModel) -> Callable[..., tuple[Tensor]]:
    """Compile it as the write-up on AudioLDM 2 does: `mode="reduce-overhead", fullgraph=True`, static shapes."""
    options = {"mode": case.compile_mode} if case.compile_mode else {"backend": case.compile_backend}
    return torch.compile(unet, fullgraph=True, **options)  # type: ignore[call-overload]


class Ours:
    """The engine, set up as the model `unet` sets it up.

    Args:
        case: What is measured.
        device: The case's if None.
        weights: The folder with the UNet and the scheduler, in diffusers' layout; the case's if None.
        dtype: As in `config.pbtxt`.
        cuda_graphs: As in `config.pbtxt`.
        compiled_rows: Rows of forwards that are compiled before the first request, and the only ones with graphs; the
            default are graphs of the UNet as it is, for all usual numbers of rows.
        compiles_behind: Whether the server's own default is compiled while requests are served, as a server does it.
        compile_cache: What Inductor keeps; the case's if None.
        report: Gets each sentence that goes to the server's log.

    Attributes:
        sentences: Those sentences.
        prepared: What makes the UNet fast.
        metrics: What the loop counts.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device | None = None,
        *,
        weights: Path | None = None,
        dtype: str = AUTO,
        cuda_graphs: str = AUTO,
        compiled_rows: Sequence[int] = (),
        compiles_behind: bool = False,
        compile_cache: Path | None = None,
        report: Callable[[str], object] | None = None,
    ) -> None:
        self._case, self._report = case, report
        device = device or torch.device(case.device)
        self._compiled = tuple(FixedShape(rows, case.frames, GRAPH_TOKENS) for rows in compiled_rows)
        self.sentences: list[str] = []
        self.metrics = LoopMetrics()
        fixed = self._compiled or (None if cuda_graphs != "off" else ())
        self._cache = compile_cache or case.compile_cache
        preparation = Preparation(AUTO if compiles_behind else "", cuda_graphs, fixed, self._cache)
        options = committed_options(dtype, preparation)
        folder = weights or case.work
        self.prepared = PreparedUNet(folder / "unet", device, options, self._take)
        schedulers = SchedulerSteps(NoiseSchedulers.load(folder / "scheduler" / "scheduler_config.json"))
        self.engine = DenoisingEngine(
            self.prepared.load, schedulers, options, self.metrics, make_graphs=self._compile_and_make_graphs
        )
        if compiles_behind:
            self.prepared.compile_in_background()

    def __enter__(self) -> "Ours":
        return self

    def __exit__(self, *exception: object) -> None:
        self.prepared.close()
        self.engine.close()

    @property
    def has_graphs(self) -> bool:
        """Whether a graph was captured."""
        return any(sentence.startswith("captured") for sentence in self.sentences)

    @property
    def compiles(self) -> bool:
        """Whether something is or was compiled behind the requests."""
        return self.has_graphs and bool(self.prepared.choice.compile_backend)

    def start(self, request: DenoisingRequest) -> "Future[Tensor]":
        """Start a request."""
        return self.engine.submit(request)

    def run(self, requests: Sequence[DenoisingRequest]) -> list[Tensor]:
        """Start requests together; return their latents."""
        return [future.result() for future in [self.start(request) for request in requests]]

    def run_staggered(self, requests: Sequence[DenoisingRequest], at_once: int, gap_s: float) -> float:
        """Keep so many requests running until all are done; return the seconds.

        The first ones start with a gap between them, so that each is at another step; where one ends, the next starts.
        """
        started = time.perf_counter()
        waiting, running = list(requests), set()
        for _ in range(at_once):
            running.add(self.start(waiting.pop()))
            time.sleep(gap_s)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                if waiting:
                    running.add(self.start(waiting.pop()))
        return time.perf_counter() - started

    def _compile_and_make_graphs(self, unet: UNetForward) -> TickGraphs | None:
        if self._compiled:
            preparation = Preparation(self._case.compile_backend, "off", self._compiled, self._cache)
            for shape, seconds in unet.prepare(preparation):
                self._take(f"compiled {shape} in {seconds:.1f} s")
        return self.prepared.make_graphs(unet)

    def _take(self, sentence: str) -> None:
        self.sentences.append(sentence)
        if self._report:
            self._report(sentence)


def make_request(case: Case, *, guided: bool, seed: int = 0, steps: int | None = None) -> DenoisingRequest:
    """Return the request whose latents DiffusersLoop computes with that seed."""
    text = Text.random(case, guided=guided)
    scheduler = SchedulerRequest("DPMSolverMultistepScheduler", (), steps or case.steps, 0.0, seed)
    return DenoisingRequest(
        text.generated,
        text.prompt,
        text.mask,
        latents_shape=(1, 8, case.frames, 16),
        guidance_scale=GUIDANCE_SCALE if guided else None,
        scheduler=scheduler,
    )


def make_requests(case: Case, count: int, *, guided: bool, steps: int | None = None) -> list[DenoisingRequest]:
    """Return requests with the seeds 0, 1, ..."""
    return [make_request(case, guided=guided, seed=seed, steps=steps) for seed in range(count)]


def committed_options(dtype: str, preparation: Preparation) -> LoopOptions:
    """Return the options of the committed configuration, but for how the UNet is prepared."""
    found = re.findall(r'key: "(\w+)" value: { string_value: "([^"]*)" }', CONFIG.read_text())
    parameters: dict[str, str] = {key: value for key, value in found if key != "jobs_model"}
    options = LoopOptions.from_parameters(ConfigParameters(parameters))
    return replace(options, dtype=dtype, preparation=preparation)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 as such: NVIDIA's GPUs round convolutions to TF32 otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
