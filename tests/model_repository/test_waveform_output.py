"""The last stage's inputs: what doesn't fit is refused by name, and who has left gets no audio."""

import time

import numpy as np
import pytest
from waveform_output import PostprocessError, check_embeds, check_finite, check_sizes, check_wanted, cut, no_scores

GOOD = {
    "waveform": np.zeros((4, 100), np.float32),
    "num_samples": np.array([50]),
    "sampling_rate": np.array([16_000]),
    "num_waveforms_per_prompt": np.array([2]),
    "clap_text_embeds": np.zeros((4, 8), np.float32),
}
INT32_MIN, INT64_MIN = -(2**31), -(2**63)


@pytest.mark.parametrize(
    "fits",
    [
        {},
        {"num_samples": np.array([100])},
        {"num_waveforms_per_prompt": np.array([4])},
        {"num_waveforms_per_prompt": np.array([1]), "clap_text_embeds": np.zeros((0, 8))},
        {"clap_text_embeds": np.zeros((2, 8))},
    ],
)
def test_what_fits_is_let_through(fits):
    check_sizes(GOOD | fits)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"waveform": np.zeros((0, 100))}, "waveform must have at least 1 row, got 0."),
        ({"waveform": np.zeros((4, 0))}, "num_samples is out of bounds: it must be between 1 and 0 .* got 50."),
        ({"num_samples": np.array([0])}, "num_samples is out of bounds: .* got 0."),
        ({"num_samples": np.array([101])}, "num_samples is out of bounds: it must be between 1 and 100 .* got 101."),
        ({"num_samples": np.array([INT64_MIN])}, "num_samples is out of bounds: .*"),
        ({"num_waveforms_per_prompt": np.array([0])}, "num_waveforms_per_prompt is out of bounds: .* got 0."),
        ({"num_waveforms_per_prompt": np.array([-2])}, "num_waveforms_per_prompt is out of bounds: .* got -2."),
        ({"num_waveforms_per_prompt": np.array([5])}, "num_waveforms_per_prompt is out of bounds: .* got 5."),
        ({"num_waveforms_per_prompt": np.array([3])}, "num_waveforms_per_prompt must divide the 4 rows .* got 3."),
        ({"clap_text_embeds": np.zeros((1, 8))}, "clap_text_embeds must have a row for each of the 2 .* got 1."),
        ({"clap_text_embeds": np.zeros((0, 8))}, "clap_text_embeds must have a row for each of the 2 .* got 0."),
        ({"sampling_rate": np.array([0])}, "sampling_rate is out of bounds: .* got 0."),
        ({"sampling_rate": np.array([INT32_MIN])}, "sampling_rate is out of bounds: .*"),
        ({"sampling_rate": np.array([2**31 - 1])}, "sampling_rate is out of bounds: .*"),
    ],
)
def test_what_does_not_fit_is_named(bad, sentence):
    with pytest.raises(PostprocessError, match=rf"^\[INVALID_ARG\] {sentence}$") as caught:
        check_sizes(GOOD | bad)
    assert caught.value.code == "INVALID_ARG"


def test_embeddings_of_another_width_are_named():
    check_embeds(np.zeros((4, 8)), np.zeros((2, 8)))
    with pytest.raises(PostprocessError, match="clap_text_embeds must be 8 wide, as CLAP's audio is, got 4"):
        check_embeds(np.zeros((4, 8)), np.zeros((2, 4)))


def test_who_has_left_gets_no_audio():
    now = time.time_ns() // 1000
    check_wanted({}, is_cancelled=False)
    check_wanted({"deadline_unix_us": np.array([0])}, is_cancelled=False)
    check_wanted({"deadline_unix_us": np.array([now + 10**9])}, is_cancelled=False)
    for deadline in (now - 1, 1, -1, INT64_MIN):
        with pytest.raises(PostprocessError, match=r"\[DEADLINE\] the time was up after the last step") as caught:
            check_wanted({"deadline_unix_us": np.array([deadline])}, is_cancelled=False)
        assert (caught.value.reason, caught.value.code) == ("DEADLINE", "CANCELLED")
    with pytest.raises(
        PostprocessError, match=r"\[CANCELLED\] the request was cancelled after its last step"
    ) as caught:
        check_wanted({"deadline_unix_us": np.array([1])}, is_cancelled=True)
    assert (caught.value.reason, caught.value.code) == ("CANCELLED", "CANCELLED")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_does_not_have_is_never_given(value):
    check_finite(np.zeros(3), "it is")
    with pytest.raises(PostprocessError, match=r"\[INTERNAL\] it is not finite: try a smaller guidance_scale"):
        check_finite(np.array([0.0, value]), "it is")


def test_waveforms_are_cut_and_unranked_ones_have_no_score():
    assert cut(GOOD["waveform"], 50).shape == (4, 50)
    assert no_scores(3).tolist() == [-2, -2, -2]
