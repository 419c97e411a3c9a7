"""What a client may ask for: names, defaults, limits, and the sentence for what is out of bounds."""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from admission import Budgets
from audio_geometry import AudioGeometry
from request_errors import InvalidInputError
from scheduler_names import SchedulerChoice, SchedulerNames, UnknownSchedulerError

if TYPE_CHECKING:
    from config_parameters import ConfigParameters

MAX_SEED = 2**63 - 1
DRAWN_SEED_BITS = 32
"""Seeds drawn by the server stay short enough to be typed, and exact in JSON's numbers."""

DEFAULT_SCHEDULER = SchedulerChoice("DPMSolverMultistepScheduler")


Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Limits:
    """Upper bounds of a request, and of all together, from the parameters in `config.pbtxt`.

    Attributes:
        max_num_prompts: Prompts in a request. Twice as many rows (with the negative prompts) must fit into the
            `max_batch_size` of text_encoder and gpt2.
        max_prompt_bytes: UTF-8 bytes in a prompt. Only the first 512 tokens count anyway.
        max_num_inference_steps: Denoising steps.
        max_audio_length_in_s: Seconds, per waveform.
        max_num_waveforms_per_prompt: Candidates per prompt.
        max_total_audio_length_in_s: Seconds, over all waveforms of a request.
        budgets: What all live requests together may occupy.
    """

    max_num_prompts: int
    max_prompt_bytes: int
    max_num_inference_steps: int
    max_audio_length_in_s: float
    max_num_waveforms_per_prompt: int
    max_total_audio_length_in_s: float
    budgets: Budgets

    @classmethod
    def from_parameters(cls, parameters: "ConfigParameters") -> "Limits":
        """Read the `parameters` of config.pbtxt.

        Raises:
            ValueError: One is missing, unknown, or not a positive number; the text names it.
        """
        limits = cls(
            max_num_prompts=parameters.count("max_num_prompts"),
            max_prompt_bytes=parameters.count("max_prompt_bytes"),
            max_num_inference_steps=parameters.count("max_num_inference_steps"),
            max_audio_length_in_s=parameters.number("max_audio_length_in_s"),
            max_num_waveforms_per_prompt=parameters.count("max_num_waveforms_per_prompt"),
            max_total_audio_length_in_s=parameters.number("max_total_audio_length_in_s"),
            budgets=Budgets.from_parameters(parameters),
        )
        parameters.refuse_others()
        return limits


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request; the defaults are those of the public contract.

    Attributes:
        prompts: At least one, none of them blank.
        negative_prompts: As many as prompts, or None for none.
        audio_length_in_s: Seconds.
        num_inference_steps: Denoising steps.
        guidance_scale: Up to 1, there is no guidance.
        guidance_start, guidance_end: Between which parts of the steps there is guidance, 0 to 1; the start is less.
        num_waveforms_per_prompt: Candidates per prompt.
        seed: Of the noise.
        scheduler: What the name that was given stands for.
        eta: DDIM's noise, 0 for none.
    """

    prompts: tuple[str, ...]
    audio_length_in_s: float
    negative_prompts: tuple[str, ...] | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 3.5
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    num_waveforms_per_prompt: int = 1
    seed: int = field(default_factory=lambda: secrets.randbits(DRAWN_SEED_BITS))
    scheduler: SchedulerChoice = DEFAULT_SCHEDULER
    eta: float = 0.0

    @property
    def num_waveforms(self) -> int:
        """Waveforms of the whole request."""
        return len(self.prompts) * self.num_waveforms_per_prompt

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional half is computed, at some steps at least."""
        return self.guidance_scale > 1.0

    def denoising_options(self, geometry: AudioGeometry) -> str:
        """Return what the model `unet` needs to know, as one line of JSON.

        A new option of the denoising is added here and in the unet's DenoisingRequest.
        """
        options = {
            "latents_shape": geometry.latents_shape(self.num_waveforms, self.audio_length_in_s),
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale if self.do_classifier_free_guidance else None,
            "guidance_start": self.guidance_start,
            "guidance_end": self.guidance_end,
            "scheduler": self.scheduler.class_name,
            "scheduler_options": dict(self.scheduler.options),
            "eta": self.eta,
            "seed": self.seed,
        }
        return json.dumps(options)


def parse_request(
    inputs: Mapping[str, np.ndarray], geometry: AudioGeometry, schedulers: SchedulerNames, limits: Limits
) -> GenerationRequest:
    """Turn the public inputs of a Triton request into a checked GenerationRequest.

    Args:
        inputs: The tensors that the client sent, by name.
        geometry: The checkpoint's sizes, for the default and the smallest length.
        schedulers: The names that `scheduler` may have.
        limits: Upper bounds.

    Raises:
        InvalidInputError: An input is out of bounds.
    """
    if "prompt" not in inputs:
        raise InvalidInputError("prompt", "is missing: describe the sound in it.")
    prompts = _prompts(inputs["prompt"], limits)
    given: dict[str, Any] = {"prompts": prompts, "audio_length_in_s": geometry.default_audio_length_in_s}
    if "negative_prompt" in inputs:
        given["negative_prompts"] = _negative_prompts(inputs["negative_prompt"], len(prompts), limits)
    if "scheduler" in inputs:
        given["scheduler"] = _scheduler(inputs["scheduler"][0], schedulers, limits)
    integer_bounds = {
        "num_inference_steps": (1, limits.max_num_inference_steps),
        "num_waveforms_per_prompt": (1, limits.max_num_waveforms_per_prompt),
        "seed": (0, MAX_SEED),
    }
    real_bounds = {
        "guidance_scale": (0.0, math.inf),
        "guidance_start": (0.0, 1.0),
        "guidance_end": (0.0, 1.0),
        "audio_length_in_s": (geometry.min_audio_length_in_s, limits.max_audio_length_in_s),
        "eta": (0.0, 1.0),
    }
    for name in inputs.keys() & integer_bounds.keys():
        given[name] = _bounded(name, int(inputs[name][0]), *integer_bounds[name])
    for name in inputs.keys() & real_bounds.keys():
        given[name] = _bounded(name, _decimal(inputs[name][0]), *real_bounds[name])
    request = GenerationRequest(**given)
    _check_guidance_interval(request)
    _check_total_length(request, limits)
    return request


def _prompts(tensor: np.ndarray, limits: Limits) -> tuple[str, ...]:
    count = _bounded("prompt", tensor.size, 1, limits.max_num_prompts, what="the number of prompts")
    prompts = tuple(_text("prompt", value, limits) for value in tensor.reshape(count))
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InvalidInputError("prompt", f"{index} of {count} is blank: describe the sound in it.")
    return prompts


def _negative_prompts(tensor: np.ndarray, num_prompts: int, limits: Limits) -> tuple[str, ...]:
    if tensor.size not in (1, num_prompts):
        raise InvalidInputError(
            "negative_prompt", f"must hold 1 text or as many as there are prompts ({num_prompts}), got {tensor.size}."
        )
    texts = tuple(_text("negative_prompt", value, limits) for value in tensor.reshape(-1))
    return texts if len(texts) == num_prompts else texts * num_prompts


def _scheduler(value: bytes | str, schedulers: SchedulerNames, limits: Limits) -> SchedulerChoice:
    try:
        return schedulers.choose(_text("scheduler", value, limits))
    except UnknownSchedulerError as error:
        raise InvalidInputError("scheduler", str(error)) from None


def _text(name: str, value: bytes | str, limits: Limits) -> str:
    encoded = value.encode() if isinstance(value, str) else value
    _bounded(name, len(encoded), 0, limits.max_prompt_bytes, what="the number of bytes")
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(name, f"must be UTF-8, and byte {error.start} of it isn't.") from None


def _decimal(value: np.floating[Any]) -> float:
    """Return the shortest decimal that is this float32: what the client wrote, 5.1 and not 5.099999904632568."""
    return float(str(np.float32(value)))


def _bounded(name: str, value: Number, low: Number, high: Number, *, what: str = "it") -> Number:
    if not (low <= value <= high and math.isfinite(value)):
        bound = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise InvalidInputError(name, f"is out of bounds: {what} must be finite and {bound}, got {value}.")
    return value


def _check_guidance_interval(request: GenerationRequest) -> None:
    if request.guidance_start >= request.guidance_end:
        raise InvalidInputError(
            "guidance_start", f"must be less than guidance_end ({request.guidance_end}), got {request.guidance_start}."
        )


def _check_total_length(request: GenerationRequest, limits: Limits) -> None:
    total = request.num_waveforms * request.audio_length_in_s
    if total > limits.max_total_audio_length_in_s:
        raise InvalidInputError(
            "audio_length_in_s",
            f"is out of bounds: {len(request.prompts)} prompts x {request.num_waveforms_per_prompt} waveforms x "
            f"{request.audio_length_in_s:g} s must be at most {limits.max_total_audio_length_in_s:g} s, "
            f"got {total:g} s.",
        )
