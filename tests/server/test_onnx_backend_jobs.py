"""What an ONNX model does with a request that has waited for it, by the job boards of its server."""

import os
import time
from collections.abc import Iterator

import job_folder
import pytest
from job_board import JobBoard
from onnx_backend_jobs import JobBoards


@pytest.fixture
def board(tmp_path, monkeypatch) -> Iterator[JobBoard]:
    monkeypatch.setattr(job_folder, "SHARED_MEMORY", tmp_path)
    return JobBoard(job_folder.folder_of("jobs", os.getpid()), pytest.fail)


@pytest.fixture
def boards(board) -> JobBoards:  # noqa: ARG001 - in its folder
    return JobBoards("vae", os.getpid(), pytest.fail)


def microseconds_from_now(seconds: float) -> int:
    return time.time_ns() // 1000 + round(seconds * 1e6)


@pytest.mark.parametrize("deadline_in_s", [None, 60.0])
def test_a_request_that_somebody_waits_for_is_computed(board, boards, deadline_in_s):
    deadline_unix_us = 0 if deadline_in_s is None else microseconds_from_now(deadline_in_s)
    entry = board.create_entry("a", deadline_unix_us)
    assert boards.given_up("a") is None
    assert board.status(b"a").state == "queued"
    assert board.open_entry("a", entry.ticket).record == entry.record, "nothing was written"


def test_a_cancelled_request_is_left_out_and_its_entry_ended(board, boards):
    entry = board.create_entry("a")
    view = entry.view()
    board.cancel(b"a")
    error = boards.given_up("a")
    assert (error.reason, str(error)) == ("CANCELLED", "[CANCELLED] the request was cancelled before it came to vae.")
    assert board.status(b"a").state == "cancelled"
    assert view.record().reason == "CANCELLED"
    view.close()


def test_a_request_whose_time_is_up_is_left_out_and_its_entry_ended(board, boards):
    view = board.create_entry("a", microseconds_from_now(-0.001)).view()
    error = boards.given_up("a")
    assert (error.reason, str(error)) == ("DEADLINE", "[DEADLINE] the time was up before the request came to vae.")
    assert (view.record().status.state, view.record().reason) == ("failed", "DEADLINE")
    view.close()


@pytest.mark.parametrize("request_id", ["", "nobody's", "a" * 1000, "../x", "a\0b"])
def test_a_request_that_no_board_knows_is_computed(boards, request_id):
    assert boards.given_up(request_id) is None
    boards.end_failed(request_id, "INTERNAL")


def test_of_two_requests_with_one_id_neither_is_taken_for_the_other(board, boards):
    board.create_entry("a")
    board.create_entry("a")
    board.cancel(b"a")
    assert boards.given_up("a") is None
    boards.end_failed("a", "INTERNAL")
    assert board.status(b"a").state == "queued"


def test_a_request_that_fails_here_has_ended(board, boards):
    view = board.create_entry("a").view()
    boards.end_failed("a", "INTERNAL")
    assert (view.record().status.state, view.record().reason) == ("failed", "INTERNAL")
    assert boards.given_up("a") is None
    view.close()


def test_a_server_without_a_board_computes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(job_folder, "SHARED_MEMORY", tmp_path)
    boards = JobBoards("vae", os.getpid(), pytest.fail)
    assert boards.given_up("a") is None
    assert list(tmp_path.iterdir()) == [], "none is made"


def test_all_boards_of_the_server_are_asked_and_those_of_others_are_not(board, tmp_path, monkeypatch):
    monkeypatch.setattr(job_folder, "SHARED_MEMORY", tmp_path)
    music = JobBoard(job_folder.folder_of("music_jobs", os.getpid()), pytest.fail)
    other = JobBoard(job_folder.folder_of("jobs", os.getppid()), pytest.fail)
    boards = JobBoards("vae", os.getpid(), pytest.fail)
    for each, request_id in ((board, "a"), (music, "b"), (other, "c")):
        each.create_entry(request_id)
        each.cancel(request_id.encode())
    assert [boards.given_up(request_id) is None for request_id in "abc"] == [False, False, True]
