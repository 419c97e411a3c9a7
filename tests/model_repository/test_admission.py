"""Who is let in: what a request occupies, for how long, and what is refused beside what is live."""

import dataclasses

import pytest
from admission import LOOP_SILENCE_S, Budgets, Load, load_of, occupied, silence_limit_s
from config_parameters import ConfigParameters
from generation_request import GenerationRequest
from job_entry import HEARTBEAT_S, JobRecord, JobStatus, JobTimes
from request_errors import ServerBusyError

from tests.helpers.triton_configs import read_parameters

BUDGETS = Budgets(max_live_text_tokens=1000, max_live_rows=8, max_live_audio_s=60.0)
COMMITTED = Budgets.from_parameters(ConfigParameters(read_parameters("tokenizer")))
LOAD = Load(tokens=100, rows=2, audio_s=10.0)


def request(num_prompts: int = 1, **options) -> GenerationRequest:
    return GenerationRequest(prompts=("a",) * num_prompts, **{"audio_length_in_s": 10.0} | options)


def record(state: str = "queued", **times: float) -> JobRecord:
    return JobRecord(1, 0.0, JobStatus(state), JobTimes(arrived_s=1.0, **times))


@pytest.mark.parametrize(
    ("options", "load"),
    [
        ({}, Load(24, 2, 10.0)),
        ({"guidance_start": 0.5, "guidance_end": 0.6}, Load(24, 2, 10.0)),
        ({"guidance_scale": 1.0}, Load(12, 1, 10.0)),
        ({"num_prompts": 3, "num_waveforms_per_prompt": 4}, Load(72, 24, 120.0)),
        ({"audio_length_in_s": 0.04, "num_waveforms_per_prompt": 2}, Load(24, 4, 2.0)),
    ],
    ids=["guided", "guided at times", "not guided", "prompts and candidates", "each waveform counts as a second"],
)
def test_a_request_occupies_what_its_stages_will_compute(options, load):
    assert load_of(request(**options), tokens_per_row=12) == load


@pytest.mark.parametrize(
    ("field", "beside", "too_much", "sentence"),
    [
        ("tokens", 900, 101, "it has 900 tokens of text to encode of at most 1000, and this request has 101"),
        ("rows", 6, 3, "it has 6 rows to denoise of at most 8, and this request has 3"),
        ("audio_s", 50.0, 10.5, "it has 50 seconds of audio to deliver of at most 60, and this request has 10.5"),
    ],
)
def test_what_goes_beyond_a_budget_is_refused_and_what_fills_it_is_not(field, beside, too_much, sentence):
    live = dataclasses.replace(Load(1, 1, 1.0), **{field: beside})
    with pytest.raises(ServerBusyError) as caught:
        BUDGETS.check(live, dataclasses.replace(Load(), **{field: too_much}))
    assert str(caught.value) == f"[UNAVAILABLE] the server is full: {sentence}: try again later."
    for fits in (too_much - 1, 0):
        BUDGETS.check(live, dataclasses.replace(Load(), **{field: fits}))


@pytest.mark.parametrize(
    ("live", "sentence"),
    [
        (Load(), ""),
        (Load(949, 7, 56.9), ""),
        (Load(950, 0, 0.0), "it has 950 tokens of text to encode of at most 1000"),
        (Load(0, 8, 0.0), "it has 8 rows to denoise of at most 8"),
        (Load(0, 30, 0.0), "it has 30 rows to denoise of at most 8"),
        (Load(1, 1, 57.0), "it has 57 seconds of audio to deliver of at most 60"),
    ],
)
def test_one_budget_that_is_nearly_used_up_is_full_for_all(live, sentence):
    assert BUDGETS.why_full(live) == (f"the server is full: {sentence}: try again later." if sentence else "")


def test_a_request_of_any_size_is_let_in_where_nothing_is_live():
    BUDGETS.check(Load(), Load(10**6, 10**6, 10.0**6))


def test_a_large_request_is_not_held_up_by_those_that_occupy_nothing_of_its_kind():
    BUDGETS.check(Load(audio_s=10.0), Load(10**6, 10**6, 1.0))


@pytest.mark.parametrize(
    ("state", "times", "left", "left_if_given_up"),
    [
        ("queued", {}, LOAD, Load(tokens=100)),
        ("queued", {"encoded_s": 2.0}, Load(rows=2, audio_s=10.0), Load(rows=2, audio_s=10.0)),
        ("denoising", {"encoded_s": 2.0, "denoising_s": 3.0}, Load(rows=2, audio_s=10.0), Load(rows=2, audio_s=10.0)),
        ("decoding", {"encoded_s": 2.0, "decoding_s": 4.0}, Load(audio_s=10.0), Load(audio_s=10.0)),
        ("done", {"encoded_s": 2.0, "ended_s": 5.0}, Load(), Load()),
        ("failed", {"ended_s": 5.0}, Load(), Load()),
        ("cancelled", {"ended_s": 5.0}, Load(), Load()),
    ],
)
def test_a_request_occupies_less_with_each_stage_behind_it_and_nothing_in_the_end(state, times, left, left_if_given_up):
    assert occupied(LOAD, record(state, **times), False) == left
    assert occupied(LOAD, record(state, **times), True) == left_if_given_up


def test_the_more_work_is_before_a_request_the_longer_it_may_be_silent():
    much = Load(COMMITTED.max_live_text_tokens, 0, COMMITTED.max_live_audio_s)
    for times in ({}, {"encoded_s": 2.0, "decoding_s": 4.0}):
        assert silence_limit_s(record(**times), Load()) < silence_limit_s(record(**times), much)


def test_a_request_in_the_loop_may_miss_a_heartbeat():
    assert silence_limit_s(record(encoded_s=2.0), LOAD) == LOOP_SILENCE_S >= 2 * HEARTBEAT_S


def test_the_committed_budgets_let_in_two_of_the_longest_texts_and_many_small_ones_beside():
    longest, small = load_of(request(16), 512), load_of(request(), 30)
    live = Load(tokens=longest.tokens)
    COMMITTED.check(live, dataclasses.replace(longest, rows=0))
    live += Load(tokens=longest.tokens)
    for _ in range(100):
        COMMITTED.check(live, Load(tokens=small.tokens))
        live += Load(tokens=small.tokens)
    with pytest.raises(ServerBusyError, match="tokens of text to encode"):
        COMMITTED.check(live, longest)


def test_the_committed_budgets_fill_the_loop_and_leave_some_to_wait():
    usual, live, count = load_of(request(audio_length_in_s=10.24), 30), Load(), 0
    while live.rows + usual.rows <= COMMITTED.max_live_rows:
        COMMITTED.check(live, usual)
        live, count = live + usual, count + 1
    with pytest.raises(ServerBusyError, match="rows to denoise"):
        COMMITTED.check(live, usual)
    assert count * usual.rows >= 2 * int(read_parameters("unet")["max_rows"])
    assert count >= 32


def test_what_is_let_in_is_never_refused_by_the_denoising_loop():
    # A request has a row at least, and one that waits isn't denoised.
    assert int(read_parameters("unet")["max_queue_size"]) >= COMMITTED.max_live_rows


@pytest.mark.parametrize("name", ["max_live_text_tokens", "max_live_rows", "max_live_audio_s"])
def test_a_wrong_budget_is_named(name):
    for value in ("0", "-1", "many", "inf"):
        with pytest.raises(ValueError, match=f"parameter {name} must be a positive"):
            Budgets.from_parameters(ConfigParameters(read_parameters("tokenizer") | {name: value}))
