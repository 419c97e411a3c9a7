"""Seconds to samples to frames, against the arithmetic that diffusers' pipeline does."""

import numpy as np
import pytest
from audio_geometry import AudioGeometry
from hypothesis import given
from hypothesis import strategies as st

OFFICIAL = AudioGeometry(
    sampling_rate=16_000,
    hop_length=160,
    num_mel_bins=64,
    vae_scale_factor=4,
    num_latent_channels=8,
    default_num_latent_frames=256,
)


def test_the_default_length_of_the_official_checkpoints_is_10_24_s():
    assert OFFICIAL.default_audio_length_in_s == 10.24
    assert OFFICIAL.latents_shape(1, OFFICIAL.default_audio_length_in_s) == (1, 8, 256, 16)
    assert OFFICIAL.num_samples(OFFICIAL.default_audio_length_in_s) == 163_840


def test_the_shortest_length_is_one_latent_frame():
    assert OFFICIAL.num_latent_frames(OFFICIAL.min_audio_length_in_s) == 1


@pytest.mark.parametrize(("length", "frames"), [(0.05, 2), (2.56, 64), (5.0, 125), (5.1, 128), (150, 3750)])
def test_latent_frames_are_rounded_up(length, frames):
    assert OFFICIAL.num_latent_frames(length) == frames


@given(length=st.floats(0.04, 160), rate=st.sampled_from([16_000, 44_100, 48_000]))
def test_enough_latent_frames_are_made_for_the_samples(length, rate):
    geometry = AudioGeometry(rate, 160, 64, 4, 8, 256)
    made = geometry.num_latent_frames(length) * geometry.vae_scale_factor * geometry.hop_length
    # diffusers rounds mel frames down, so up to one mel frame may be missing; the official vocoders add 32 samples.
    assert made > geometry.num_samples(length) - geometry.hop_length


@given(length=st.floats(0.04, 160))
def test_frames_are_those_of_the_pipeline(length):
    upsample_factor = np.prod([5, 4, 2, 2, 2]) / 16_000
    height = int(length / upsample_factor)
    if height % 4:
        height = int(np.ceil(height / 4)) * 4
    assert OFFICIAL.num_latent_frames(length) * 4 == height
