"""Served audio against `diffusers.AudioLDM2Pipeline` on the same weights, in fp32.

With `--parity-report FILE`, the errors that were measured are written there (`make parity`).
"""

import shutil

import numpy as np
import pytest
from audioldm2_client import AudioLDM2Client

from export.checkpoint import Checkpoint
from export.demo import WIDTHS, write_checkpoint
from export.repository import export_checkpoint
from server import EmbeddedServer
from tests.helpers import job_calls
from tests.helpers.parity_cases import (
    CASES,
    INTERVAL,
    SHORT,
    TOLERANCE,
    ParityCase,
    reference_audio,
    relative_rms_error,
)

FAR = 10 * TOLERANCE
"""What is meant to be different is at least this far away."""

# diffusers' own: torchsde complains of rounding in the times that DPMSolverSDEScheduler asks for, and librosa's lazy
# loading of a deprecated module.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def client(triton: EmbeddedServer):
    with AudioLDM2Client(triton.grpc_url) as client:
        yield client


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}: {case.name}")
def test_served_audio_equals_the_pipelines(client, pipeline, parity_errors, case):
    served = client.generate(**case.call, scheduler=case.scheduler, seed=case.seed)
    expected = reference_audio(pipeline, case)
    error = relative_rms_error(served.audio, expected)
    parity_errors[case.group, case.name] = error
    assert error <= TOLERANCE
    assert np.sqrt(np.mean(expected**2)) > FAR, "silence would agree with anything"


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


@pytest.mark.parametrize("scheduler", ["dpm++2m", "euler-a", "heun"])
@pytest.mark.parametrize("other", [{"guidance_start": 0.0}, {"guidance_end": 0.6}], ids=["begins", "ends"])
def test_an_interval_of_guidance_with_one_step_more_would_not_agree(pipeline, scheduler, other):
    audio, other_audio = (
        reference_audio(pipeline, ParityCase("", "", {**INTERVAL, **change}, scheduler)) for change in ({}, other)
    )
    assert relative_rms_error(other_audio, audio) > TOLERANCE


def test_the_schedulers_of_the_table_are_not_all_the_same(client):
    schedulers = ("ddim", "ddpm", "heun", "dpm++2m", "dpm++2m-karras", "dpm++2m-sde", "dpm++sde", "edm-euler")
    audio = [client.generate("a dog", seed=3, scheduler=name, **SHORT).audio for name in schedulers]
    for index, one in enumerate(audio):
        for other in audio[:index]:
            assert relative_rms_error(one, other) > FAR


def test_the_seed_that_the_server_drew_gives_the_same_audio_again(client):
    first = client.generate("a dog barking", num_inference_steps=3, audio_length_in_s=0.64)
    again = client.generate("a dog barking", num_inference_steps=3, audio_length_in_s=0.64, seed=first.seed)
    other = client.generate("a dog barking", num_inference_steps=3, audio_length_in_s=0.64)
    np.testing.assert_array_equal(again.audio, first.audio)
    assert other.seed != first.seed


@pytest.mark.parametrize("scheduler", ["ddpm", "euler-a", "dpm2-a", "dpm++2m-sde", "dpm++sde"])
def test_a_stochastic_schedulers_noise_follows_the_seed_alone(client, scheduler):
    first, again, other = (
        client.generate("a dog", seed=seed, scheduler=scheduler, **SHORT).audio for seed in (3, 3, 2**40)
    )
    np.testing.assert_array_equal(again, first)
    assert relative_rms_error(other, first) > FAR


def test_candidates_of_several_prompts_are_ranked_within_their_prompt(client, pipeline):
    prompts = ["a dog barking", "a church bell ringing in the distance"]
    served = client.generate(prompts, num_waveforms_per_prompt=3, seed=5, **SHORT)
    # diffusers mixes the prompts when it ranks; with one text per waveform it makes the same rows unranked.
    repeated = [prompt for prompt in prompts for _ in range(3)]
    unranked = reference_audio(pipeline, ParityCase("", "", {"prompt": repeated}, seed=5))
    for rows in (slice(0, 3), slice(3, 6)):
        assert (np.diff(served.clap_scores[rows]) < 0).all()
        errors = np.array([[relative_rms_error(one, other) for other in unranked[rows]] for one in served.audio[rows]])
        assert errors.min(axis=1).max() <= TOLERANCE
        assert set(errors.argmin(axis=1)) == {0, 1, 2}


def test_scores_are_those_of_clap(client, pipeline):
    served = client.generate("a dog", num_waveforms_per_prompt=2, seed=1, num_inference_steps=2, audio_length_in_s=2.56)
    features = pipeline.feature_extractor(
        [resample(waveform) for waveform in served.audio], sampling_rate=48_000, return_tensors="pt"
    )
    text = pipeline.tokenizer("a dog", return_tensors="pt")
    output = pipeline.text_encoder(**text, **features)
    scores = (output.text_embeds @ output.audio_embeds.T)[0].detach().numpy()
    np.testing.assert_allclose(served.clap_scores, scores, atol=1e-4)


def resample(waveform: np.ndarray) -> np.ndarray:
    import librosa

    return librosa.resample(waveform, orig_sr=16_000, target_sr=48_000)


def test_one_waveform_is_not_scored(client):
    assert np.isnan(client.generate(["a dog", "a cat"], **SHORT).clap_scores).all()


def test_prompts_beyond_512_tokens_are_reported(client):
    result = client.generate(["a dog barking in the rain " * 120, "a cat"], **SHORT)
    assert result.truncated_tokens[0] > 0
    assert result.truncated_tokens[1] == 0


OTHER_WIDTHS = {
    **WIDTHS["demo"],
    "clap_projection": 48,
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4},
    "gpt2": {"n_embd": 96, "n_layer": 1, "n_head": 3},
    "unet": {
        "block_out_channels": (32, 64, 64, 96),
        "attention_head_dim": (1, 2, 2, 3),
        "layers_per_block": 1,
        "sample_size": 128,
    },
    "vocoder": {"upsample_initial_channel": 128, "sampling_rate": 24_000, "upsample_rates": [6, 5, 2, 2, 2]},
}


def test_two_differently_shaped_checkpoints_are_served_by_one_server(
    exported_repository, pipeline, tmp_path, monkeypatch
):
    from diffusers import AudioLDM2Pipeline

    monkeypatch.setitem(WIDTHS, "other", OTHER_WIDTHS)
    write_checkpoint(tmp_path / "other", size="other", seed=9, language_model="GPT2LMHeadModel")
    output = shutil.copytree(exported_repository, tmp_path / "model_repository")
    other = Checkpoint.find(str(tmp_path / "other"))
    export_checkpoint(other, output, name="audioldm2_other", on_start=[].append, on_done=print)
    other_pipeline = AudioLDM2Pipeline.from_pretrained(tmp_path / "other", low_cpu_mem_usage=False)
    other_pipeline.set_progress_bar_config(disable=True)
    case = ParityCase("", "", {"num_waveforms_per_prompt": 2})
    with EmbeddedServer(output) as server:
        for name, reference in (("audioldm2", pipeline), ("audioldm2_other", other_pipeline)):
            with AudioLDM2Client(server.grpc_url, model_name=name) as client:
                served = client.generate(**case.call, seed=case.seed)
                assert relative_rms_error(served.audio, reference_audio(reference, case)) <= TOLERANCE
                assert served.sampling_rate == reference.vocoder.config.sampling_rate
                if name == "audioldm2_other":
                    whole = client.generate("a dog", num_inference_steps=1)
                    assert whole.audio.shape == (1, 128 * 4 * 240)
        assert job_calls.generate(server, "id", "audioldm2_other", num_inference_steps=1).status == 200
        assert job_calls.ask(server, "id", model="audioldm2_other_jobs")["state"] == "done"
        assert job_calls.ask(server, "id", model="jobs")["state"] == "unknown", "each ensemble has its own"
