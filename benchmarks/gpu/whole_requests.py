"""The sections about whole requests in one process: ours without tritonserver, and diffusers' pipeline."""

import time
from functools import partial

import numpy as np
import torch
from denoising_request import DenoisingRequest, SchedulerRequest
from diffusers import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from fixed_shape_forward import use_compile_cache
from scheduler_steps import initial_noise

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import clock_of, relative_rms
from benchmarks.gpu.loops import GUIDANCE_SCALE, Ours, compile_diffusers_unet, exact_float32
from benchmarks.gpu.repository import STAGES, checkpoint_folder
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import wait_for
from benchmarks.gpu.stages import OnnxStages, RunStage, TorchStages
from benchmarks.gpu.unet_sections import auto_dtype
from benchmarks.gpu.ways import DIFFUSERS_COMPILED, DIFFUSERS_FP32, DIFFUSERS_HALF, OURS_ONNX, OURS_TORCH
from benchmarks.stages import load_module, make_inputs
from export.checkpoint import Checkpoint
from export.demo_unet import TEXT_WIDTHS

SEED = 0
NEGATIVE_PROMPT = "low quality"
AUDIO_BOUND = 0.2
"""Of a request's audio, relative RMS against the pipeline in float32: half precision through all stages."""


class InProcess:
    """A whole request as the server computes it, without tritonserver: one thread, one process.

    Args:
        case: What is measured.
        ours: The denoising loop.
        run: The other stages.
        found: The checkpoint; its tokenizers are used.
    """

    def __init__(self, case: Case, ours: Ours, run: RunStage, found: Checkpoint) -> None:
        self._case, self._ours, self._run = case, ours, run
        self._clap, self._t5 = found.load("tokenizer"), found.load("tokenizer_2")

    def generate(self, prompt: str) -> np.ndarray:
        """Return the audio, float32 [1, samples]."""
        texts = [NEGATIVE_PROMPT, prompt]
        clap = self._clap(texts, padding=True, truncation=True, return_tensors="pt")
        t5 = self._t5(texts, padding="max_length", max_length=self._case.tokens, truncation=True, return_tensors="pt")
        tokens = {
            "clap_input_ids": clap.input_ids,
            "clap_attention_mask": clap.attention_mask,
            "t5_input_ids": t5.input_ids,
            "t5_attention_mask": t5.attention_mask,
        }
        projected, projected_mask, prompt_embeds, *_ = self._run("text_encoder", tokens)
        (generated,) = self._run(
            "gpt2", {"projected_prompt_embeds": projected, "projected_attention_mask": projected_mask}
        )
        request = DenoisingRequest(
            generated.float().cpu(),
            prompt_embeds.float().cpu(),
            t5.attention_mask,
            latents_shape=(1, 8, self._case.frames, 16),
            guidance_scale=GUIDANCE_SCALE,
            scheduler=SchedulerRequest("DPMSolverMultistepScheduler", (), self._case.steps, 0.0, SEED),
        )
        (latents,) = self._ours.run([request])
        (mel,) = self._run("vae", {"latents": latents})
        (waveform,) = self._run("vocoder", {"mel_spectrogram": mel})
        return waveform.float().cpu().numpy()


def make_prompt(found: Checkpoint, tokens: int) -> str:
    """Return a prompt of so many T5 tokens."""
    tokenizer, prompt = found.load("tokenizer_2"), "a dog barking"
    while len(tokenizer(prompt).input_ids) < tokens:
        prompt += " a"
    return prompt


def request(case: Case, results: Results) -> None:
    """A whole request in one process: ours with PyTorch's stages, and diffusers' pipeline in three ways."""
    wait_for(case, results, "checkpoint")
    found = Checkpoint.find(str(checkpoint_folder(case)))
    prompt = make_prompt(found, case.tokens)
    pipeline = _Pipeline(case, prompt)
    with exact_float32():
        np.save(case.work / "audio.npy", pipeline.generate())
    clock = clock_of(torch.device(case.device))
    repeats = max(2, case.repeats // 2)
    results.measure(f"request/{DIFFUSERS_FP32}", pipeline.generate, clock, repeats=repeats)
    pipeline.halve()
    check_audio(case, results, DIFFUSERS_HALF, pipeline.generate())
    results.measure(f"request/{DIFFUSERS_HALF}", pipeline.generate, clock, repeats=repeats)
    run = TorchStages(case, {stage: load_module(found, stage) for stage in STAGES})
    _measure_ours(case, results, OURS_TORCH, run)
    if not case.is_rehearsal:  # there the loops rehearse it
        pipeline.compile()
    check_audio(case, results, DIFFUSERS_COMPILED, pipeline.generate())
    results.measure(f"request/{DIFFUSERS_COMPILED}", pipeline.generate, clock, repeats=repeats, warm_up=3)


def onnx(case: Case, results: Results) -> None:
    """The exported stages in ONNX Runtime, alone and in a whole request."""
    wait_for(case, results, "export")
    run = OnnxStages(case)
    for stage, inputs in make_inputs(case.length_s, TEXT_WIDTHS[case.size][0]).items():
        results.measure(
            f"stage/{stage}/ONNX Runtime", partial(run, stage, inputs), time.perf_counter, repeats=case.repeats
        )
    _measure_ours(case, results, OURS_ONNX, run)


def _measure_ours(case: Case, results: Results, way: str, run: RunStage) -> None:
    found = Checkpoint.find(str(checkpoint_folder(case)))
    prompt = make_prompt(found, case.tokens)
    weights, dtype = checkpoint_folder(case), auto_dtype(case, results)
    rows = () if case.is_rehearsal else case.first_rows  # there the loops rehearse it
    with Ours(case, weights=weights, dtype=dtype, compiled_rows=rows) as ours:
        whole = InProcess(case, ours, run, found)
        check_audio(case, results, way, whole.generate(prompt))
        clock = clock_of(torch.device(case.device))
        results.measure(f"request/{way}", partial(whole.generate, prompt), clock, repeats=case.repeats, warm_up=2)


def check_audio(case: Case, results: Results, way: str, audio: np.ndarray) -> None:
    """Compare audio with the pipeline's in float32, where that was made."""
    if (case.work / "audio.npy").exists():
        expected = torch.from_numpy(np.load(case.work / "audio.npy"))
        samples = min(audio.shape[1], expected.shape[1])
        error = relative_rms(torch.from_numpy(audio)[:, :samples], expected[:, :samples])
        results.add_error(f"{way}/audio", error, AUDIO_BOUND)


class _Pipeline:
    """Diffusers' pipeline over the checkpoint, with noise that is made before."""

    def __init__(self, case: Case, prompt: str) -> None:
        self._case, self._prompt = case, prompt
        self._pipeline = AudioLDM2Pipeline.from_pretrained(checkpoint_folder(case), low_cpu_mem_usage=False)
        self._pipeline.scheduler = DPMSolverMultistepScheduler.from_config(self._pipeline.scheduler.config)
        self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.to(case.device)
        noise = initial_noise((1, 8, case.frames, 16), torch.Generator().manual_seed(SEED))
        self._noise = noise.to(case.device)

    def halve(self) -> None:
        """Compute in half precision from now on."""
        half = getattr(torch, self._case.half)
        self._pipeline.to(half)
        self._noise = self._noise.to(half)

    def compile(self) -> None:
        """Compile the UNet, as the write-up on AudioLDM 2 does."""
        use_compile_cache(self._case.compile_cache)
        self._pipeline.unet = compile_diffusers_unet(self._case, self._pipeline.unet)

    def generate(self) -> np.ndarray:
        """Return the audio, float32 [1, samples]."""
        return self._pipeline(
            self._prompt,
            negative_prompt=NEGATIVE_PROMPT,
            audio_length_in_s=self._case.length_s,
            num_inference_steps=self._case.steps,
            guidance_scale=GUIDANCE_SCALE,
            latents=self._noise,
        ).audios
