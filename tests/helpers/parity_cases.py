"""What served audio is compared with diffusers for: one table for the tests and for docs/parity.md."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AudioLDM2Pipeline
from scheduler_names import ALIASES

from tests.helpers.guidance_interval import guidance_in_interval

TOLERANCE = 1e-3
"""Relative RMS error, the contract's."""

SHORT = {"num_inference_steps": 5, "audio_length_in_s": 0.64}


@dataclass(frozen=True)
class ParityCase:
    """One generation, asked of the server and of diffusers.

    Attributes:
        group: The feature that it is about.
        name: What is special about it.
        arguments: Of `AudioLDM2Client.generate` and `AudioLDM2Pipeline.__call__`, which share their names.
        scheduler: A class or an alias.
        seed: Of the noise.
    """

    group: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "DPMSolverMultistepScheduler"
    seed: int = 3

    @property
    def call(self) -> dict[str, Any]:
        """All arguments but scheduler and seed."""
        return {"prompt": "a dog barking in the rain", **SHORT, **self.arguments}


LONG_NEGATIVE = "low quality, average quality, noisy, distorted, and a good deal longer than the prompt itself"
INTERVAL = {"guidance_start": 0.1, "guidance_end": 0.4}
"""An early one: late forwards change little, whether they have guidance or not."""

CASES = (
    *(ParityCase("scheduler", name, scheduler=name) for name in sorted({name for name, _ in ALIASES.values()})),
    *(ParityCase("scheduler option", name, scheduler=name) for name, (_, options) in ALIASES.items() if options),
    *(ParityCase("eta", f"DDIM, {eta:g}", {"eta": eta}, "DDIMScheduler") for eta in (0.0, 0.5, 1.0)),
    *(ParityCase("guidance", f"{scale:g}", {"guidance_scale": scale}) for scale in (0.0, 1.0, 1.5, 3.5, 7.0)),
    *(
        ParityCase("guidance interval", f"0.1 to 0.4, {name}", INTERVAL, name)
        for name in ("dpm++2m", "ddim", "euler-a", "heun", "dpm++sde")
    ),
    ParityCase("guidance interval", "from 0.2", {"guidance_start": 0.2}),
    ParityCase("guidance interval", "until 0.4", {"guidance_end": 0.4}),
    ParityCase("guidance interval", "0.45 to 0.55: no step", {"guidance_start": 0.45, "guidance_end": 0.55}),
    ParityCase(
        "guidance interval",
        "0.1 to 0.4, 2 prompts, 2 negative prompts",
        {**INTERVAL, "prompt": ["a dog", "a church bell"], "negative_prompt": ["noise", LONG_NEGATIVE]},
    ),
    ParityCase("negative prompt", "none"),
    ParityCase("negative prompt", "shorter than the prompt", {"negative_prompt": "noise"}),
    ParityCase("negative prompt", "longer than the prompt", {"negative_prompt": LONG_NEGATIVE}),
    ParityCase("negative prompt", "without guidance", {"negative_prompt": "noise", "guidance_scale": 1.0}),
    ParityCase("prompts", "3 prompts", {"prompt": ["a dog", "a church bell ringing in the distance", "rain"]}),
    ParityCase(
        "prompts",
        "3 prompts, 3 negative prompts",
        {"prompt": ["a dog", "a church bell", "rain"], "negative_prompt": ["noise", LONG_NEGATIVE, ""]},
    ),
    ParityCase("prompts", "longer than 512 tokens", {"prompt": "a dog barking in the rain " * 120}),
    ParityCase("prompts", "not ASCII", {"prompt": "Zürich, 東京 \N{DOG FACE}"}),
    *(ParityCase("length", f"{length:g} s", {"audio_length_in_s": length}) for length in (0.04, 0.64, 2.56, 5.0, 5.1)),
    ParityCase("length", "the default, 10.24 s", {"audio_length_in_s": 10.24}, "DDIMScheduler"),
    ParityCase("steps", "1", {"num_inference_steps": 1}),
    ParityCase("steps", "20", {"num_inference_steps": 20}),
    ParityCase("steps", "50, DDIM", {"num_inference_steps": 50}, "DDIMScheduler"),
    ParityCase("candidates", "3, ranked", {"num_waveforms_per_prompt": 3, "audio_length_in_s": 2.56}),
    ParityCase("candidates", "3, ranked by a random crop", {"num_waveforms_per_prompt": 3, "audio_length_in_s": 10.24}),
)


def reference_audio(pipeline: AudioLDM2Pipeline, case: ParityCase) -> np.ndarray:
    """Return what diffusers' own pipeline makes of `case`, float32 [waveforms, samples]."""
    name, options = ALIASES.get(case.scheduler, (case.scheduler, {}))
    # DPMSolverSDEScheduler draws its noise by itself; without a seed, not the same twice.
    own_noise = {"noise_sampler_seed": case.seed} if name == "DPMSolverSDEScheduler" else {}
    original = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, name).from_config(original.config, **options, **own_noise)
    np.random.seed(case.seed)  # for the crop that CLAP's feature extractor makes beyond 10 s
    arguments = dict(case.call)
    interval = arguments.pop("guidance_start", 0.0), arguments.pop("guidance_end", 1.0)
    if isinstance(arguments["prompt"], list) and isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(arguments["prompt"])
    try:
        with guidance_in_interval(pipeline, *interval):
            return pipeline(generator=torch.Generator("cpu").manual_seed(case.seed), **arguments).audios
    finally:
        pipeline.scheduler = original


def relative_rms_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the RMS of the difference over the RMS of `expected`."""
    assert actual.shape == expected.shape
    difference = np.sqrt(np.mean(np.square(actual.astype(np.float64) - expected)))
    return float(difference / np.sqrt(np.mean(np.square(expected.astype(np.float64)))))
