"""Served audio against `diffusers.AudioLDM2Pipeline` on the same weights, in fp32."""

import numpy as np
import pytest
from audioldm2_client import AudioLDM2Client
from reference import reference_audio, relative_rms_error

from server import EmbeddedServer

TOLERANCE = 1e-3
"""Relative RMS error, the contract's."""

FAR = 1e-2
"""What is meant to be different is at least ten tolerances away."""

CASES = {
    "short prompt": {"prompt": "a dog barking in the rain", "seed": 0},
    "long prompt": {"prompt": "techno music with a strong, upbeat tempo and high melodic riffs, zebra", "seed": 1},
    "negative prompt": {"prompt": "a church bell ringing", "negative_prompt": "low quality, noisy", "seed": 7},
}


@pytest.fixture(scope="module")
def client(triton: EmbeddedServer):
    with AudioLDM2Client(triton.grpc_url) as client:
        yield client


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_served_audio_equals_the_pipelines(client, pipeline, case, scheduler):
    arguments = {**case, "num_inference_steps": 6, "audio_length_in_s": 2.56}
    served = client.generate(**arguments, scheduler=scheduler)
    expected = reference_audio(pipeline, scheduler, **arguments)
    assert served.audio.shape == (1, 40960)
    assert relative_rms_error(served.audio, expected) <= TOLERANCE
    assert np.sqrt(np.mean(expected**2)) > 1e-2, "silence would agree with anything"


def test_another_seed_another_prompt_and_another_negative_prompt_are_far_away(client):
    arguments = {"num_inference_steps": 6, "audio_length_in_s": 2.56}
    audio = client.generate("a dog barking in the rain", seed=0, **arguments).audio
    others = {
        "seed": client.generate("a dog barking in the rain", seed=1, **arguments).audio,
        "prompt": client.generate("a church bell ringing", seed=0, **arguments).audio,
        "negative prompt": client.generate(
            "a dog barking in the rain", negative_prompt="low quality", seed=0, **arguments
        ).audio,
    }
    for what, other in others.items():
        assert relative_rms_error(other, audio) > FAR, what


def test_the_seed_that_the_server_drew_gives_the_same_audio_again(client):
    first = client.generate("a dog barking", num_inference_steps=3, audio_length_in_s=0.64)
    again = client.generate("a dog barking", num_inference_steps=3, audio_length_in_s=0.64, seed=first.seed)
    other = client.generate("a dog barking", num_inference_steps=3, audio_length_in_s=0.64)
    np.testing.assert_array_equal(again.audio, first.audio)
    assert other.seed != first.seed


@pytest.mark.parametrize("length", [0.04, 0.64, 5.1])
def test_lengths_that_are_no_whole_latent_frames_are_cut_as_the_pipeline_cuts_them(client, pipeline, length):
    arguments = {"prompt": "a cat", "seed": 3, "num_inference_steps": 2, "audio_length_in_s": length}
    served = client.generate(**arguments, scheduler="DDIMScheduler")
    expected = reference_audio(pipeline, "DDIMScheduler", **arguments)
    assert relative_rms_error(served.audio, expected) <= TOLERANCE


def test_several_prompts_and_candidates_come_in_the_pipelines_order(client, pipeline):
    arguments = {
        "prompt": ["a dog barking", "a church bell ringing in the distance"],
        "negative_prompt": ["low quality", "noisy, a very long negative prompt that is cut to the prompts' length"],
        "seed": 5,
        "num_inference_steps": 3,
        "audio_length_in_s": 0.64,
    }
    served = client.generate(**arguments, num_waveforms_per_prompt=2)
    # With one prompt text per waveform, diffusers' pipeline makes the same rows without ranking them.
    repeated = {name: [text for text in arguments[name] for _ in range(2)] for name in ("prompt", "negative_prompt")}
    expected = reference_audio(pipeline, "DPMSolverMultistepScheduler", **{**arguments, **repeated})
    assert relative_rms_error(served.audio, expected) <= TOLERANCE


def test_a_scale_of_one_means_no_guidance(client, pipeline):
    arguments = {"prompt": "a cat", "seed": 3, "num_inference_steps": 3, "audio_length_in_s": 0.64}
    served = client.generate(**arguments, guidance_scale=1.0)
    expected = reference_audio(pipeline, "DPMSolverMultistepScheduler", **arguments, guidance_scale=1.0)
    assert relative_rms_error(served.audio, expected) <= TOLERANCE
    assert relative_rms_error(client.generate(**arguments).audio, expected) > FAR
