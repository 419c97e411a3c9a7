"""The live requests of an ensemble: none is counted for longer than it is live, and each is reported once."""

import time
from pathlib import Path

import pytest
from admission import (
    GIVEN_UP_SILENCE_S,
    MIN_WAVEFORM_S,
    OVERTAKEN_SILENCE_S,
    SILENCE_PER_AUDIO_S,
    SILENCE_PER_TOKEN_S,
    SILENCE_S,
    Budgets,
    Load,
    load_of,
)
from generation_request import GenerationRequest
from job_board import JobBoard
from job_entry import HEARTBEAT_S, JobEntry
from live_requests import EndedRequest, LiveRequests
from request_errors import ServerBusyError

REQUEST = GenerationRequest(prompts=("a",), audio_length_in_s=MIN_WAVEFORM_S)
LOAD = load_of(REQUEST, 10)
FOUR = Budgets(max_live_text_tokens=1000, max_live_rows=4 * LOAD.rows, max_live_audio_s=1000.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(tmp_path, clock) -> JobBoard:
    return JobBoard(tmp_path / "board", pytest.fail, clock)


@pytest.fixture
def stages(tmp_path, clock) -> JobBoard:
    """The board as the other stages have it."""
    return JobBoard(tmp_path / "board", pytest.fail, clock)


@pytest.fixture
def live(board, clock) -> LiveRequests:
    return LiveRequests(FOUR, board, clock)


def come(live: LiveRequests, board: JobBoard, request_id: str = "", deadline_unix_us: int = 0) -> int:
    """Let a request in, as the first stage does; return its ticket."""
    with board.create_entry(request_id, deadline_unix_us) as entry:
        live.admit(LOAD, REQUEST, entry, request_id)
        return entry.ticket


def unet(stages: JobBoard, ticket: int, request_id: str = "") -> JobEntry:
    entry = stages.open_entry(request_id, ticket)
    entry.enter_queue()
    entry.start_denoising()
    return entry


def test_requests_are_let_in_until_the_budget_is_full_and_again_when_one_is_denoised(live, board, stages):
    tickets = [come(live, board, f"{number}") for number in range(4)]
    with pytest.raises(ServerBusyError, match="it has 8 rows to denoise of at most 8, and this request has 2"):
        come(live, board)
    unet(stages, tickets[2], "2").end("decoding")
    come(live, board)
    with pytest.raises(ServerBusyError):
        come(live, board)


def test_a_request_is_reported_once_with_what_it_asked_for_and_where_its_time_went(live, board, stages, clock):
    come(live, board, "before")
    ticket = come(live, board, "a")
    clock.now += 1
    entry = unet(stages, ticket, "a")
    clock.now += 2
    entry.end("decoding")
    clock.now += 4
    assert live.take_ended() == []
    stages.open_entry("a", ticket).end("done")
    seconds = {"text": 1, "queue": 0, "denoise": 2, "decode": 4, "total": 7}
    assert live.take_ended() == [EndedRequest("a", ticket, "ok", seconds, REQUEST, requests_ahead=1)]
    assert live.take_ended() == []
    assert len(live) == 1


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda entry: entry.end("cancelled"), "CANCELLED"),
        (lambda entry: entry.end("failed"), "INTERNAL"),
        (lambda entry: entry.end("failed", "DEADLINE"), "DEADLINE"),
        (lambda entry: entry.end("failed", "UNAVAILABLE"), "UNAVAILABLE"),
    ],
)
def test_a_request_stops_counting_however_it_ends(live, board, stages, end, reason):
    for request_id in ("", "a"):
        ticket = come(live, board, request_id)
        assert live.load() == LOAD
        end(unet(stages, ticket, request_id))
        assert live.load() == Load()
        assert [ended.reason for ended in live.take_ended()] == [reason]


def test_of_two_requests_with_one_id_both_are_seen_to_their_ends(live, board, stages):
    first, second = come(live, board, "a"), come(live, board, "a")
    stages.cancel(b"a")
    unet(stages, second, "a").end("cancelled")
    unet(stages, first, "a").end("failed")
    assert [(ended.ticket, ended.reason) for ended in live.take_ended()] == [
        (first, "INTERNAL"),
        (second, "CANCELLED"),
    ]
    assert live.load() == Load()


def test_a_cancelled_request_occupies_no_rows_while_its_text_is_still_encoded(live, board, stages):
    for number in range(4):
        come(live, board, f"{number}")
        stages.cancel(f"{number}".encode())
    assert live.load() == Load(tokens=4 * LOAD.tokens), "the stage works on it, or has it in its queue"
    come(live, board)


def test_a_passed_deadline_occupies_no_rows_while_the_text_is_still_encoded(live, board):
    come(live, board, deadline_unix_us=time.time_ns() // 1000 - 1)
    come(live, board, deadline_unix_us=time.time_ns() // 1000 + 10**9)
    assert live.load() == LOAD + Load(tokens=LOAD.tokens)


def test_a_request_whose_text_stage_has_failed_stops_counting(live, board, clock):
    ticket = come(live, board, "a")
    live.load()
    clock.now += SILENCE_S - 1
    assert live.load() == LOAD
    clock.now += 2
    live.load()
    assert live.load() == Load()
    [ended] = live.take_ended()
    assert (ended.ticket, ended.reason, set(ended.seconds)) == (ticket, "INTERNAL", {"text", "total"})
    assert board.status(b"a").state == "failed"


def test_a_request_whose_decoding_has_failed_stops_counting(live, board, stages, clock):
    ticket = come(live, board)
    clock.now += SILENCE_S / 2
    unet(stages, ticket).end("decoding")
    live.load()
    clock.now += SILENCE_S
    assert live.load() == Load(audio_s=LOAD.audio_s), "there is something to decode, which takes its time"
    clock.now += SILENCE_S
    live.load()
    assert live.load() == Load()
    assert [ended.reason for ended in live.take_ended()] == ["INTERNAL"]


@pytest.mark.parametrize("passes", [True, False])
def test_what_triton_drops_while_its_text_is_encoded_ends_as_cancelled_soon(live, board, stages, clock, passes):
    ticket = come(live, board, "left")
    live.load()
    stages.cancel(b"left")
    clock.now += 0.001
    if passes:
        unet(stages, come(live, board, "later"), "later").end("failed")
    live.load()
    clock.now += (
        0.001 + OVERTAKEN_SILENCE_S if passes else 0.001 + GIVEN_UP_SILENCE_S + SILENCE_PER_TOKEN_S * LOAD.tokens
    )
    live.load()
    assert live.load() == Load()
    assert [(ended.ticket, ended.reason) for ended in live.take_ended() if ended.request_id == "left"] == [
        (ticket, "CANCELLED")
    ]
    assert board.status(b"left").state == "cancelled"
    assert stages.open_entry("left", ticket).is_cancelled(), "a stage to which it comes all the same drops it"


@pytest.mark.parametrize("is_decoding", [False, True])
def test_what_triton_is_known_to_have_dropped_waits_for_nothing_before_it(live, board, stages, clock, is_decoding):
    tickets = {}
    for name in ("long", "left", "cancelled"):
        with board.create_entry(name) as entry:
            live.admit(Load(tokens=300, audio_s=300.0), REQUEST, entry, name)
            tickets[name] = entry.ticket
        clock.now += 0.001
    if is_decoding:
        for name, ticket in tickets.items():
            unet(stages, ticket, name).end("decoding")
            clock.now += 0.001
    live.load()
    stages.cancel(b"cancelled")
    stages.cancel(b"left", is_dropped=True)
    stages.cancel(b"left")  # a client that cancels it, too, changes nothing
    live.load()
    clock.now += 0.001 + GIVEN_UP_SILENCE_S
    live.load()
    assert live.load().audio_s == (600.0 if is_decoding else 300.0)
    assert live.load().tokens == (0 if is_decoding else 600)
    assert [(ended.request_id, ended.reason) for ended in live.take_ended()] == [("left", "CANCELLED")]


@pytest.mark.parametrize("passes", [True, False])
def test_what_triton_drops_while_its_audio_is_decoded_ends_soon(live, board, stages, clock, passes):
    tickets = [come(live, board, name, time.time_ns() // 1000 - 1) for name in ("late", "later")]
    for ticket, name in zip(tickets, ("late", "later"), strict=True):
        unet(stages, ticket, name).end("decoding")
        clock.now += 0.001
    live.load()
    stages.open_entry("later", tickets[1]).end("done" if passes else "failed")
    clock.now += (
        0.001 + OVERTAKEN_SILENCE_S if passes else 0.001 + GIVEN_UP_SILENCE_S + 2 * SILENCE_PER_AUDIO_S * LOAD.audio_s
    )
    live.load()
    assert live.load() == Load()
    assert {ended.request_id: ended.reason for ended in live.take_ended()}["late"] == "DEADLINE"


def test_what_a_stage_still_works_on_counts_though_its_caller_has_left(live, board, stages, clock):
    unet(stages, come(live, board, "earlier"), "earlier").end("decoding")
    clock.now += 0.001
    come(live, board, "left")
    stages.cancel(b"left")
    for _ in range(3):
        clock.now += GIVEN_UP_SILENCE_S / 3
        assert live.load().tokens == LOAD.tokens, "an earlier request says nothing of a later one"


def test_a_later_request_says_nothing_of_one_whose_caller_waits(live, board, stages, clock):
    come(live, board, "waits")
    clock.now += 0.001
    unet(stages, come(live, board, "later"), "later").end("failed")
    for _ in range(3):
        clock.now += SILENCE_S / 4
        assert live.load() == LOAD


def test_a_request_that_is_long_denoised_is_not_lost(live, board, stages, clock):
    entry = unet(stages, come(live, board))
    for _ in range(100):
        clock.now += HEARTBEAT_S
        entry.report("denoising", 1, 1000)
        assert live.load() == Load(rows=LOAD.rows, audio_s=LOAD.audio_s)


def test_a_request_that_waits_behind_much_text_is_not_lost_when_that_is_done(live, board, stages, clock):
    big = Budgets(10**6, 10**6, 10.0**6)
    live = LiveRequests(big, board, clock)
    tickets = []
    for tokens in (40_000, 24):
        with board.create_entry("") as entry:
            live.admit(Load(tokens=tokens), REQUEST, entry, "")
            tickets.append(entry.ticket)
    live.load()
    clock.now += SILENCE_S + 100
    unet(stages, tickets[0]).end("decoding")
    assert live.load().tokens == 24
    assert live.load().tokens == 24
    live.load()
    assert live.take_ended() == []


def test_what_is_lost_and_answered_all_the_same_is_reported_once(live, board, stages, clock):
    ticket = come(live, board)
    live.load()
    clock.now += SILENCE_S + 1
    live.load()
    unet(stages, ticket).end("decoding")
    stages.open_entry("", ticket).end("done")
    assert [ended.reason for ended in live.take_ended()] == ["INTERNAL"]
    assert live.take_ended() == []


def test_refused_requests_are_reported_and_occupy_nothing(live, board):
    for number in range(4):
        come(live, board, f"{number}")
    entry = board.create_entry("a")
    entry.end("failed", "INVALID_ARG")
    live.add_refused("a", entry.record, None)
    [ended] = live.take_ended()
    assert (ended.request_id, ended.reason, ended.request, ended.requests_ahead) == ("a", "INVALID_ARG", None, 4)
    assert len(live) == 4


def test_without_a_board_requests_are_let_in_and_not_counted(tmp_path, clock):
    warnings: list[str] = []
    board = JobBoard(tmp_path / "none" / "board", warnings.append, clock)
    live = LiveRequests(FOUR, board, clock)
    for _ in range(100):
        come(live, board)
    assert (live.load(), live.take_ended(), len(warnings)) == (Load(), [], 1)


def test_ends_are_seen_also_where_the_files_were_swept_away(live, board, stages, tmp_path):
    ticket = come(live, board, "a")
    entry = unet(stages, ticket, "a")
    entry.end("cancelled")
    for path in (tmp_path / "board").iterdir():
        path.unlink()
    assert [ended.reason for ended in live.take_ended()] == ["CANCELLED"]


def test_no_descriptor_and_no_memory_stays(live, board, stages):
    def kept() -> tuple[int, int]:
        files = len(list(Path("/proc/self/fd").iterdir()))
        return files, Path("/proc/self/maps").read_text().count("/board/")

    before = kept()
    for _ in range(20):
        unet(stages, come(live, board)).end("failed")
    assert len(live.take_ended()) == 20
    assert kept() == before
