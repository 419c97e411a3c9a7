"""A UNet so small that its overhead dominates, and requests for it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from config_parameters import ConfigParameters
from denoising_request import DenoisingRequest, SchedulerRequest
from diffusers import AudioLDM2UNet2DConditionModel
from google.protobuf import text_format
from loop_options import LoopOptions
from noise_schedulers import NoiseSchedulers
from scheduler_steps import SchedulerSteps
from tritonclient.grpc import InferInput
from tritonclient.utils import np_to_triton_dtype
from unet_forward import UNetForward

from export import demo_unet
from tests.helpers.guidance_interval import keeps_guidance
from tests.helpers.triton_configs import REPOSITORY, read_configs, read_parameters

CPU = torch.device("cpu")
GENERATED_WIDTH, PROMPT_WIDTH = 12, 20
SCHEDULER_CONFIG = demo_unet.scheduler_config()

SHALLOW = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": ((None, 12, 20),) * 2,
}
"""Changes for `make_unet`: two levels instead of four, where time goes by layers."""


def make_unet(seed: int = 0, **changes: Any) -> AudioLDM2UNet2DConditionModel:
    """Return a UNet of 0.21 M parameters, with the blocks and the attentions of the official one."""
    torch.manual_seed(seed)
    widths = {
        "block_out_channels": (8, 8, 16, 16),
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return demo_unet.make_unet(GENERATED_WIDTH, PROMPT_WIDTH, **widths | changes).eval()


def make_forward(seed: int = 0) -> UNetForward:
    """Return the same, as the loop uses it."""
    return UNetForward(make_unet(seed), CPU, max_tokens=512)


def make_schedulers() -> SchedulerSteps:
    """Return the schedulers of the demo checkpoint."""
    return SchedulerSteps(NoiseSchedulers(SCHEDULER_CONFIG))


def make_options(**changes: Any) -> LoopOptions:
    """Return the committed options, with those that differ."""
    return dataclasses.replace(LoopOptions.from_parameters(ConfigParameters(read_parameters("unet"))), **changes)


def make_request(
    *,
    frames: int = 16,
    steps: int = 4,
    scheduler: str = "DPMSolverMultistepScheduler",
    guidance_scale: float | None = 3.5,
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
    tokens: int = 7,
    seed: int = 0,
    prompts: int = 1,
    waveforms_per_prompt: int = 1,
    eta: float = 0.0,
) -> DenoisingRequest:
    """Return a request with random text, the second half of its first row's tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * (1 if guidance_scale is None else 2)
    attention_mask = torch.ones(rows, tokens, dtype=torch.int64)
    attention_mask[0, (tokens + 1) // 2 :] = 0
    return DenoisingRequest(
        generated_prompt_embeds=torch.randn(rows, 8, GENERATED_WIDTH, generator=generator),
        prompt_embeds=torch.randn(rows, tokens, PROMPT_WIDTH, generator=generator),
        attention_mask=attention_mask,
        latents_shape=(prompts * waveforms_per_prompt, 8, frames, 16),
        guidance_scale=guidance_scale,
        guidance_start=guidance_start,
        guidance_end=guidance_end,
        scheduler=SchedulerRequest(scheduler, (), steps, eta, seed),
    )


@torch.inference_mode()
def reference_noise(
    unet: AudioLDM2UNet2DConditionModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    generated: torch.Tensor,
    prompt: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Return the noise that diffusers' UNet predicts."""
    return unet(
        latents,
        timesteps,
        encoder_hidden_states=generated,
        encoder_hidden_states_1=prompt,
        encoder_attention_mask_1=mask,
    ).sample


@torch.inference_mode()
def reference_latents(unet: AudioLDM2UNet2DConditionModel, request: DenoisingRequest) -> torch.Tensor:
    """Return what diffusers makes of `request`: the loop of AudioLDM2Pipeline, with its UNet and scheduler classes.

    Outside of the request's interval it is the loop without guidance, as other pipelines have it after a callback has
    switched guidance off: there the text has only the rows with the prompt.
    """
    wanted = request.scheduler
    scheduler = NoiseSchedulers(SCHEDULER_CONFIG).create(wanted.name, {}, wanted.seed)
    scheduler.set_timesteps(wanted.num_inference_steps)
    generator = torch.Generator().manual_seed(wanted.seed)
    latents = torch.randn(request.latents_shape, generator=generator) * scheduler.init_noise_sigma
    per_prompt = request.num_waveforms // request.num_prompts
    text = [
        tensor.repeat_interleave(per_prompt, dim=0)
        for tensor in (request.generated_prompt_embeds, request.prompt_embeds, request.attention_mask)
    ]
    known = scheduler.step.__code__.co_varnames
    options = {k: v for k, v in {"generator": generator, "eta": wanted.eta}.items() if k in known}
    for index, timestep in enumerate(scheduler.timesteps):
        inside = keeps_guidance(request.guidance_start, request.guidance_end, index, len(scheduler.timesteps))
        scale = request.guidance_scale if inside else None
        sample = latents if scale is None else torch.cat([latents] * 2)
        present_text = [tensor[-len(sample) :] for tensor in text]
        noise_pred = reference_noise(unet, scheduler.scale_model_input(sample, timestep), timestep, *present_text)
        if scale is not None:
            unconditional, with_prompt = noise_pred.chunk(2)
            noise_pred = unconditional + scale * (with_prompt - unconditional)
        latents = scheduler.step(noise_pred, timestep, latents, **options).prev_sample
    return latents


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative RMS error."""
    return float((actual - expected).norm() / expected.norm())


def save_unet(folder: Path, seed: int = 0) -> AudioLDM2UNet2DConditionModel:
    """Write the UNet into `folder`, as the export does, and return it."""
    unet = make_unet(seed)
    unet.save_pretrained(folder)
    return unet


def write_unet_repository(repository: Path, **parameters: Any) -> Path:
    """Write a model repository with the committed models `unet`, over the tiny UNet, and `jobs`; return it.

    Args:
        repository: The folder, which is made.
        parameters: Those of config.pbtxt that differ.
    """
    for model in ("unet", "jobs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(REPOSITORY / model, repository / model, ignore=ignored)
    config = read_configs()["unet"]
    for name, value in parameters.items():
        config.parameters[name].string_value = str(value)
    (repository / "unet" / "config.pbtxt").write_text(text_format.MessageToString(config))
    version = repository / "unet" / "1"
    save_unet(version / "unet")
    (version / "scheduler").mkdir(exist_ok=True)
    (version / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER_CONFIG))
    return repository


def denoising_options(request: DenoisingRequest) -> bytes:
    """Return the JSON that stands for all of a request but its text."""
    wanted = request.scheduler
    options = {
        "latents_shape": request.latents_shape,
        "guidance_scale": request.guidance_scale,
        "guidance_start": request.guidance_start,
        "guidance_end": request.guidance_end,
        "scheduler": wanted.name,
        "scheduler_options": dict(wanted.options),
        "num_inference_steps": wanted.num_inference_steps,
        "eta": wanted.eta,
        "seed": wanted.seed,
    }
    return json.dumps(options).encode()


def unet_inputs(request: DenoisingRequest) -> list[InferInput]:
    """Return the inputs of the model `unet`, for a gRPC client."""
    arrays = {
        "generated_prompt_embeds": request.generated_prompt_embeds.numpy(),
        "prompt_embeds": request.prompt_embeds.numpy(),
        "attention_mask": request.attention_mask.numpy(),
        "denoising_options": np.array([denoising_options(request)], np.object_),
    }
    tensors = []
    for name, array in arrays.items():
        tensors.append(InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    return tensors
