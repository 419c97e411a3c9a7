"""A short soak of a real server: whatever callers do, each request is accounted for, and nothing is left."""

import asyncio
import os

import pytest

from benchmarks.server_process import Address
from benchmarks.soak import Soak, Soaker
from benchmarks.soak_plan import Deed, Seen, draw_actions
from benchmarks.wire import LEFT, OK, PROTOCOLS
from server import EmbeddedServer

ROUNDS, PER_ROUND = 3, 50
SEED = 100
SECONDS = 240.0
"""For a machine that is busy; it takes forty."""
MOST_GROWTH = 1.5
"""Of a process's memory from the first round on: what it needs at all is there only after some hundred requests."""
IDLE_S = 3.0
"""Until the rows are free, on a machine that is busy; a second else."""


@pytest.fixture(scope="module")
def soak(triton: EmbeddedServer) -> Soak:
    address = Address(triton.http_url, triton.grpc_url, triton.metrics_url, os.getpid())
    return asyncio.run(Soaker(address, triton.log_text, SEED).run(ROUNDS, PER_ROUND, SECONDS))


def test_every_request_is_accounted_for_with_what_its_caller_was_told(soak):
    assert len(soak.seen) == ROUNDS * PER_ROUND
    assert soak.problems == []


def test_metrics_count_what_the_log_tells(soak):
    assert soak.miscounted == {}
    assert soak.counted["ok"] >= ROUNDS * PER_ROUND / 4


def test_nobody_works_for_those_who_have_left(soak):
    assert [one.live for one in soak.rounds] == [[]] * ROUNDS
    assert max(one.rows_free_s for one in soak.rounds) < IDLE_S


def test_a_good_request_gets_the_same_audio_before_during_and_after(soak):
    assert len(soak.audio) == 1


def test_no_file_is_left(soak):
    assert soak.new_files == set()


def test_no_process_grows_without_end(soak):
    names = {"tritonserver", "tokenizer", "unet", "vocoder", "jobs", "door", "envoy"}
    growth = {name: ratio for name, ratio in soak.growth(0).items() if name in names}
    assert set(growth) == names
    assert max(growth.values()) < MOST_GROWTH, growth


def test_each_deed_was_done_over_both_protocols(soak):
    assert {(one.action.deed, one.action.protocol) for one in soak.seen} == {
        (deed, protocol) for deed in Deed for protocol in PROTOCOLS
    }


ACTIONS = {action.deed: action for action in draw_actions(1, 200, "a")}


@pytest.mark.parametrize(
    ("deed", "outcome", "logged", "is_fine"),
    [
        (Deed.WAITS, OK, ["ok"], True),
        (Deed.WAITS, OK, [], False),
        (Deed.WAITS, OK, ["ok", "ok"], False),
        (Deed.WAITS, OK, ["CANCELLED"], False),
        (Deed.WAITS, "CANCELLED", ["CANCELLED"], False),
        (Deed.WAITS, "UNAVAILABLE", ["UNAVAILABLE"], True),
        (Deed.CANCELS, "CANCELLED", ["CANCELLED"], True),
        (Deed.CANCELS, "INTERNAL", ["INTERNAL"], False),
        (Deed.LEAVES, LEFT, [], True),
        (Deed.LEAVES, LEFT, ["CANCELLED"], True),
        (Deed.LEAVES, LEFT, ["INTERNAL"], False),
        (Deed.IS_WRONG, "INVALID_ARG", ["INVALID_ARG"], True),
        (Deed.IS_WRONG, OK, ["ok"], False),
        (Deed.IS_STOPPED, "INVALID_ARG", [], True),
        (Deed.IS_STOPPED, "INVALID_ARG", ["INVALID_ARG"], False),
    ],
)
def test_a_request_that_is_not_accounted_for_is_seen(deed, outcome, logged, is_fine):
    problem = Seen(ACTIONS[deed], outcome).problem(logged)
    assert (problem == "") == is_fine, problem


def test_equal_seeds_draw_equal_actions():
    assert draw_actions(1, 50, "a") == draw_actions(1, 50, "a") != draw_actions(2, 50, "a")
