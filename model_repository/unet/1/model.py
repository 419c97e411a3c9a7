"""Triton adapter of the denoising loop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from denoising_loop import DenoisingRequest, InvalidShapeError, NonFiniteError, SchedulerStepsError, denoise
from diffusers import AudioLDM2UNet2DConditionModel
from noise_schedulers import NoiseSchedulers, UnknownSchedulerError


class TritonPythonModel:
    """Denoises latents, one request after the other; one response for each request.

    Inputs (`rows`: the prompts, with guidance after as many negative prompts):
        generated_prompt_embeds: FP32 [rows, 8, GPT-2 width].
        prompt_embeds: FP32 [rows, tokens, T5 width].
        attention_mask: INT64 [rows, tokens].
        latents_shape: INT64 [4], waveforms, channels, frames, bins.
        num_inference_steps: INT32 [1].
        guidance_scale: FP32 [1].
        seed: INT64 [1].
        scheduler: BYTES [1], the name of a class.
        scheduler_options: BYTES [1], JSON, what differs from the checkpoint's scheduler configuration.
        eta: FP32 [1].

    Outputs:
        latents: FP32 [waveforms, channels, frames, bins].
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the UNet and the scheduler's configuration."""
        folder = Path(args["model_repository"]) / args["model_version"]
        on_gpu = args["model_instance_kind"] == "GPU" and torch.cuda.is_available()
        self._schedulers = NoiseSchedulers.load(folder / "scheduler" / "scheduler_config.json")
        unet = AudioLDM2UNet2DConditionModel.from_pretrained(
            folder / "unet", local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
        self._unet = unet.eval().to(f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, with an error of its own where it is wrong."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            latents = self._denoise(inputs)
        except UnknownSchedulerError as error:
            return _failure(f"[INVALID_ARG] scheduler {error}", pb_utils.TritonError.INVALID_ARG)
        except SchedulerStepsError as error:
            return _failure(f"[INVALID_ARG] num_inference_steps {error}", pb_utils.TritonError.INVALID_ARG)
        except InvalidShapeError as error:
            return _failure(f"[INVALID_ARG] {error}", pb_utils.TritonError.INVALID_ARG)
        except NonFiniteError as error:
            return _failure(f"[INTERNAL] {error}", pb_utils.TritonError.INTERNAL)
        return pb_utils.InferenceResponse([pb_utils.Tensor("latents", latents)])

    def _denoise(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        request = _denoising_request(inputs)
        request.check()
        options = json.loads(inputs["scheduler_options"][0])
        scheduler = self._schedulers.create(inputs["scheduler"][0].decode(), options, request.seed)
        return denoise(self._unet, scheduler, request).float().cpu().numpy()


def _denoising_request(inputs: dict[str, np.ndarray]) -> DenoisingRequest:
    waveforms, channels, frames, bins = inputs["latents_shape"].tolist()
    return DenoisingRequest(
        generated_prompt_embeds=torch.from_numpy(inputs["generated_prompt_embeds"]),
        prompt_embeds=torch.from_numpy(inputs["prompt_embeds"]),
        attention_mask=torch.from_numpy(inputs["attention_mask"]),
        latents_shape=(waveforms, channels, frames, bins),
        num_inference_steps=int(inputs["num_inference_steps"][0]),
        guidance_scale=float(inputs["guidance_scale"][0]),
        seed=int(inputs["seed"][0]),
        eta=float(inputs["eta"][0]),
    )


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
