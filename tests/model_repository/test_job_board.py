"""The job board: what is seen of a request, who owns an id, how it is cancelled, and that nothing grows or escapes."""

import errno
import hashlib
import itertools
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import job_board
import pytest
from job_board import KEPT_ENTRIES, MAX_ENTRIES, MAX_ID_BYTES, MAX_TOMBSTONES, TOMBSTONE_TTL_S, JobBoard
from job_entry import (
    FINISHED_TTL_S,
    HEARTBEAT_S,
    LIVE_TTL_S,
    REASONS,
    STATES,
    JobEntry,
    JobRecord,
    JobStatus,
    JobTimes,
    set_cancelled,
)

UNKNOWN = JobStatus()


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What a board complains of; nothing, unless the test empties it."""
    told: list[str] = []
    yield told
    assert told == []


@pytest.fixture
def board(tmp_path: Path, clock: Clock, warnings: list[str]) -> JobBoard:
    return JobBoard(tmp_path / "board", warnings.append, clock)


@pytest.fixture
def other_process(tmp_path: Path, clock: Clock, warnings: list[str]) -> JobBoard:
    """The same board as another model has it."""
    return JobBoard(tmp_path / "board", warnings.append, clock)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_request_is_seen_from_its_beginning_to_its_end(board, other_process):
    tokenizer = board.create_entry("a")
    assert other_process.status(b"a") == JobStatus("queued")
    tokenizer.close()
    unet = other_process.open_entry("a", tokenizer.ticket)
    unet.report("queued", 0, 20, 3)
    assert board.status(b"a") == JobStatus("queued", 0, 20, 3)
    unet.report("denoising", 7, 20)
    assert board.status(b"a") == JobStatus("denoising", 7, 20)
    unet.end("decoding")
    assert board.status(b"a") == JobStatus("decoding", 20, 20)
    postprocess = board.open_entry("a", tokenizer.ticket)
    postprocess.end("done")
    assert board.status(b"a") == JobStatus("done", 20, 20)


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_request_that_ends_early_keeps_its_last_step(board, state):
    entry = board.create_entry("a")
    entry.report("denoising", 7, 20)
    entry.end(state)
    assert board.status(b"a") == JobStatus(state, 7, 20)


def test_what_is_reported_after_the_end_changes_nothing(board):
    entry = board.create_entry("a")
    entry.end("done")
    entry.report("denoising", 7, 20)
    entry.end("failed")
    assert board.status(b"a") == JobStatus("done")
    assert not entry.is_cancelled()


def test_a_report_of_another_thread_never_overwrites_the_end(board):
    for number in range(300):
        entry, ended = board.create_entry(f"{number}"), threading.Event()
        with ThreadPoolExecutor(1) as threads:
            threads.submit(report_until, ended, entry)
            entry.end("done")
            ended.set()
        assert board.status(f"{number}".encode()).state == "done"


def report_until(ended: threading.Event, entry: JobEntry) -> None:
    for step in itertools.count():
        entry.report("denoising", step, 10**9)
        if ended.is_set():
            return


def test_an_exception_fails_the_request(board):
    with pytest.raises(ZeroDivisionError), board.create_entry("a"):
        _ = 1 / 0
    assert board.status(b"a") == JobStatus("failed")


def test_cancelling_reaches_the_stage_that_has_the_request_and_no_report_undoes_it(board, other_process):
    entry = board.create_entry("a")
    assert not entry.is_cancelled()
    assert other_process.cancel(b"a") == JobStatus("queued")
    entry.report("denoising", 3, 20)
    assert entry.is_cancelled()
    assert other_process.open_entry("a", entry.ticket).is_cancelled()
    assert other_process.cancel(b"a") == JobStatus("denoising", 3, 20), "again"


def test_what_is_over_or_unknown_is_not_cancelled(board):
    entry = board.create_entry("a")
    entry.end("done")
    assert board.cancel(b"a") == JobStatus("done")
    assert not board.open_entry("a", entry.ticket).is_cancelled()
    assert board.cancel(b"b") == UNKNOWN
    assert board.status(b"b") == UNKNOWN


def test_of_two_requests_with_one_id_the_later_one_owns_it(board):
    first, second = board.create_entry("a"), board.create_entry("a")
    first.report("denoising", 19, 20)
    assert board.status(b"a") == JobStatus("queued")
    assert board.open_entry("a", first.ticket).record.status == JobStatus("denoising", 19, 20), "its stages go on"
    assert board.open_entry("a", second.ticket).record.is_id_shared
    board.cancel(b"a")
    assert second.is_cancelled()
    assert not first.is_cancelled()
    first.end("done")
    assert board.status(b"a") == JobStatus("queued")


def test_a_new_request_with_the_id_of_a_cancelled_one_is_not_cancelled(board):
    board.create_entry("a")
    board.cancel(b"a")
    assert not board.create_entry("a").is_cancelled()


@pytest.mark.parametrize("request_id", ["", "a" * (MAX_ID_BYTES + 1), "é" * MAX_ID_BYTES])
def test_a_request_without_a_usable_id_is_seen_by_its_stages_alone(board, other_process, tmp_path, request_id):
    entry = board.create_entry(request_id)
    other_process.open_entry(request_id, entry.ticket).report("denoising", 3, 20)
    assert board.open_entry(request_id, entry.ticket).record.status == JobStatus("denoising", 3, 20)
    assert not entry.is_cancelled()
    assert board.open_entry(request_id, 5).ticket == 0
    for asked in (request_id.encode(), f"{entry.ticket:016x}".encode(), str(entry.ticket).encode()):
        assert board.cancel(asked) == UNKNOWN
    assert not entry.is_cancelled()
    assert f"{entry.ticket:016x}" in [path.name for path in (tmp_path / "board").iterdir()]


HOSTILE_IDS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "a\0b",
    " ",
    "\t\n",
    "💣" * 32,
    "%s",
    "-rf",
    "a" * MAX_ID_BYTES,
]


@pytest.mark.parametrize("request_id", HOSTILE_IDS)
def test_ids_never_reach_a_path(board, tmp_path, request_id):
    board.create_entry(request_id).report("denoising", 1, 2)
    assert board.status(request_id.encode()) == JobStatus("denoising", 1, 2)
    assert [path.name for path in (tmp_path / "board").iterdir()] == [hashlib.sha256(request_id.encode()).hexdigest()]
    assert list(tmp_path.iterdir()) == [tmp_path / "board"]


def test_what_is_over_is_seen_for_a_minute_and_then_unknown(board, clock):
    entry = board.create_entry("a")
    entry.end("failed")
    clock.now += FINISHED_TTL_S - 1
    assert board.status(b"a").state == "failed"
    clock.now += 1
    assert board.status(b"a") == UNKNOWN


def test_a_live_request_without_news_is_forgotten_at_last(board, clock):
    entry = board.create_entry("a")
    clock.now += LIVE_TTL_S - 1
    assert board.status(b"a").state == "queued"
    clock.now += 1
    assert board.status(b"a") == UNKNOWN
    assert board.cancel(b"a") == UNKNOWN
    assert not entry.is_cancelled()


def test_a_stage_that_reports_the_same_again_and_again_keeps_its_request_known(board, clock):
    entry = board.create_entry("a")
    for _ in range(int(3 * LIVE_TTL_S / HEARTBEAT_S)):
        clock.now += HEARTBEAT_S
        entry.report("queued", 0, 20, 3)
    assert board.status(b"a") == JobStatus("queued", 0, 20, 3)


def test_what_has_not_changed_is_not_written(board, monkeypatch):
    entry = board.create_entry("a")
    writes: list[bytes] = []
    monkeypatch.setattr(os, "pwrite", lambda _file, content, _offset: writes.append(content))
    for step in (0, 0, 1, 1, 1, 2):
        entry.report("denoising", step, 20)
    assert len(writes) == 3


def test_expired_entries_are_removed_when_new_ones_come(board, clock, tmp_path):
    for number in range(20):
        board.create_entry(f"over {number}").end("done")
    live = board.create_entry("live")
    clock.now += FINISHED_TTL_S
    board.create_entry("new")
    assert len(list((tmp_path / "board").iterdir())) == 2
    assert board.open_entry("live", live.ticket).ticket == live.ticket


@pytest.mark.slow
def test_entries_are_bounded_where_two_processes_make_them(board, other_process, tmp_path):
    for number in range(2 * MAX_ENTRIES):
        (board if number % 3 else other_process).create_entry(f"over {number}").end("done")
        assert len(list((tmp_path / "board").iterdir())) <= MAX_ENTRIES


@pytest.mark.slow
def test_a_full_board_is_not_listed_for_each_new_entry(board, monkeypatch):
    listed, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    for number in range(2 * MAX_ENTRIES):
        board.create_entry(f"over {number}").end("done")
    assert len(listed) < MAX_ENTRIES / 10


@pytest.mark.slow
def test_entries_are_bounded_and_those_that_are_over_or_silent_go_first(board, clock, tmp_path):
    silent = board.create_entry("silent")
    silent.close()
    clock.now += 1
    live = board.create_entry("live")
    for number in range(3 * MAX_ENTRIES):
        board.create_entry(f"over {number}").end("done")
        assert len(list((tmp_path / "board").iterdir())) <= MAX_ENTRIES
    assert board.status(b"live").state == board.status(b"silent").state == "queued"
    for number in range(MAX_ENTRIES - 1):
        clock.now += 0.001
        live.report("denoising", number, MAX_ENTRIES)
        board.create_entry(f"flood {number}").close()
    assert KEPT_ENTRIES <= len(list((tmp_path / "board").iterdir())) <= MAX_ENTRIES
    assert board.status(b"live").state == "denoising"
    assert board.status(b"silent") == UNKNOWN


def test_no_file_stays_open(board):
    before = open_files()
    for number in range(50):
        with board.create_entry(f"{number}") as entry:
            pass
        board.open_entry(f"{number}", entry.ticket).end("done")
        board.open_entry(f"{number}", entry.ticket + 1)
        board.open_entry("unknown", 1)
        board.cancel(b"unknown")
        board.cancel(f"{number}".encode())
    assert open_files() == before


def test_files_are_private(board, tmp_path):
    previous = os.umask(0)
    try:
        board.remove()
        board.create_entry("a")
    finally:
        os.umask(previous)
    assert (tmp_path / "board").stat().st_mode & 0o777 == 0o700
    [file] = (tmp_path / "board").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_folder_is_made_anew_after_it_was_removed(board, other_process):
    entry = board.create_entry("a")
    other_process.remove()
    assert board.status(b"a") == UNKNOWN
    entry.report("denoising", 1, 2)
    board.create_entry("b")
    assert other_process.status(b"b") == JobStatus("queued")


def test_an_incomplete_file_is_no_entry_and_is_not_taken_for_an_expired_one(board, clock, tmp_path):
    path = tmp_path / "board" / hashlib.sha256(b"a").hexdigest()
    path.write_bytes(b"\0" * 7)
    assert board.status(b"a") == UNKNOWN
    assert board.open_entry("a", 1).ticket == 0
    clock.now += LIVE_TTL_S
    board.create_entry("b")
    assert path.exists()


@pytest.mark.parametrize("failing", ["open", "pwrite", "rename"])
def test_a_full_disk_is_told_once_and_requests_go_on(board, warnings, tmp_path, monkeypatch, failing):
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = open_files()
    monkeypatch.setattr(job_board.os, failing, refuse)
    for request_id in ("a", "b"):
        with board.create_entry(request_id) as entry:
            entry.report("denoising", 1, 2)
            entry.end("done")
        assert entry.ticket == 0
    monkeypatch.undo()
    assert len(warnings) == 1
    assert "No space left on device" in warnings.pop()
    assert list((tmp_path / "board").iterdir()) == [], "no draft is left"
    assert open_files() == before
    board.create_entry("c")
    assert board.status(b"c").state == "queued", "it works again when there is room"


def test_a_missing_parent_is_told_once_and_requests_go_on(tmp_path, warnings):
    board = JobBoard(tmp_path / "none" / "board", warnings.append)
    assert board.create_entry("a").ticket == 0
    assert board.status(b"a") == UNKNOWN
    board.remove()
    assert len(warnings) == 1
    warnings.clear()


def test_every_state_survives_a_file(tmp_path):
    file = os.open(tmp_path / "entry", os.O_RDWR | os.O_CREAT)
    assert JobRecord.read(file) is None
    set_cancelled(file, False)
    for number, state in enumerate(STATES):
        times = JobTimes(1.5, 2.5, 3.5, 4.5, 5.5)
        status = JobStatus(state, number, 2**31 - 1, 7)
        record = JobRecord(2**63 - 1, 12.5, status, times, 2**63 - 1, bool(number % 2), REASONS[number])
        record.write(file)
        assert JobRecord.read(file) == record
    os.close(file)


def test_an_id_that_triton_cannot_decode_is_no_id():
    class Request:
        def __init__(self, encoded: bytes) -> None:
            self._encoded = encoded

        def request_id(self) -> str:
            return self._encoded.decode()

    assert JobBoard.id_of(Request(b"a")) == "a"
    assert JobBoard.id_of(Request(b"\xff")) == ""


def test_the_first_of_two_requests_with_one_id_is_seen_to_its_end_by_its_own_stages(board, other_process):
    first, second = board.create_entry("a"), board.create_entry("a")
    view = first.view()
    first.close()
    other_process.open_entry("a", first.ticket).end("failed", "DEADLINE")
    assert view.record().status.state == "failed"
    assert not second.is_cancelled()
    assert board.status(b"a") == JobStatus("queued")
    view.close()


def test_an_id_that_is_free_again_is_not_shared(board):
    board.create_entry("a").end("done")
    assert not board.create_entry("a").record.is_id_shared


def test_a_cancellation_that_comes_first_cancels_the_request_that_comes_after_it_once(board, other_process, clock):
    assert other_process.cancel(b"a") == UNKNOWN
    assert board.status(b"a") == UNKNOWN
    clock.now += TOMBSTONE_TTL_S - 1
    assert not board.create_entry("b").is_cancelled()
    assert board.create_entry("a").is_cancelled()
    assert not board.create_entry("a").is_cancelled(), "the one after that is another request"


def test_an_id_that_is_used_later_is_not_hit_by_an_early_cancellation(board, clock):
    board.cancel(b"a")
    clock.now += TOMBSTONE_TTL_S - 1
    board.create_entry("b")  # sweeps now, and not again with the next one
    clock.now += 1
    assert not board.create_entry("a").is_cancelled()


def test_cancelling_what_is_known_leaves_nothing_for_the_next_request_with_the_id(board):
    entry = board.create_entry("a")
    board.cancel(b"a")
    entry.end("cancelled")
    board.cancel(b"a")
    assert not board.create_entry("a").is_cancelled()


def test_early_cancellations_are_bounded_and_the_latest_stay(board, clock, tmp_path):
    for number in range(MAX_TOMBSTONES + 50):
        clock.now += 0.01
        board.cancel(f"{number}".encode())
        assert len(list((tmp_path / "board").iterdir())) <= MAX_TOMBSTONES
    assert board.create_entry(f"{MAX_TOMBSTONES + 49}").is_cancelled()
    assert not board.create_entry("0").is_cancelled()


def test_what_has_expired_goes_without_another_request(board, clock, tmp_path):
    board.create_entry("over").end("done")
    board.create_entry("").end("failed")
    board.cancel(b"early")
    live = board.create_entry("live")
    clock.now += FINISHED_TTL_S
    board.sweep()
    assert len(list((tmp_path / "board").iterdir())) == 1
    assert board.open_entry("live", live.ticket).ticket == live.ticket


def test_a_request_that_comes_while_it_is_cancelled_is_cancelled(board, monkeypatch):
    entries = []
    leave = board._leave_tombstone

    def come_first(folder, name):
        entries.append(board.create_entry("a"))
        leave(folder, name)

    monkeypatch.setattr(board, "_leave_tombstone", come_first)
    assert board.cancel(b"a").state == "queued"
    assert entries[0].is_cancelled()
    entries[0].end("cancelled")
    assert not board.create_entry("a").is_cancelled(), "nothing is left for a later one"


def test_a_cancellation_that_comes_while_the_entry_is_made_cancels_it(board, monkeypatch):
    look, looks = board._take_tombstone, []

    def cancelled_after_the_first_look(folder, name):
        looks.append(look(folder, name))
        if len(looks) == 1:
            board.cancel(b"a")
        return looks[-1]

    monkeypatch.setattr(board, "_take_tombstone", cancelled_after_the_first_look)
    assert board.create_entry("a").is_cancelled()
    assert looks == [False, True]
    monkeypatch.undo()
    assert not board.create_entry("a").is_cancelled()


def test_the_file_of_a_server_that_stops_is_seen_and_stays(board, clock, tmp_path):
    assert not board.is_stopping()
    (tmp_path / "board" / job_board.STOP_FILE).touch()
    assert board.is_stopping()
    clock.now += 2 * LIVE_TTL_S
    board.create_entry("another")
    assert board.is_stopping()


def test_the_file_of_an_ensemble_without_room_says_so_until_there_is_room(board, clock, tmp_path):
    file = tmp_path / "board" / f"{job_board.FULL_FILE}audioldm2"
    for sentence in ("it has 100 rows.", "it has 95 rows."):
        board.show_full("audioldm2", sentence)
        assert file.read_text() == sentence
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    clock.now += 2 * LIVE_TTL_S
    board.create_entry("another")
    assert file.exists(), "no entry that has expired"
    for _ in range(2):
        board.show_full("audioldm2", "")
        assert not file.exists()


def test_sweeping_a_board_that_is_gone_does_nothing(board):
    board.remove()
    board.sweep()


@pytest.mark.parametrize("content", [b"", b"\0" * 3, b"\xff" * 8, b"\0" * 500])
def test_a_tombstone_that_is_damaged_harms_nobody(board, tmp_path, content):
    (tmp_path / "board" / f"{hashlib.sha256(b'a').hexdigest()}.cancelled").write_bytes(content)
    board.create_entry("a").end("done")
    board.sweep()


def test_a_link_in_the_place_of_a_tombstone_is_not_followed(board, tmp_path, warnings):
    (tmp_path / "other").write_bytes(b"\0" * 8)
    (tmp_path / "board" / f"{hashlib.sha256(b'a').hexdigest()}.cancelled").symlink_to(tmp_path / "other")
    board.create_entry("a")
    assert (tmp_path / "other").exists()
    assert len(warnings) == 1
    warnings.clear()


def test_the_times_of_all_parts_of_a_request_are_kept(board, other_process, clock):
    tokenizer = board.create_entry("a", deadline_unix_us=7)
    view = tokenizer.view()
    tokenizer.close()
    clock.now += 1
    unet = other_process.open_entry("a", tokenizer.ticket)
    unet.enter_queue()
    clock.now += 2
    unet.start_denoising()
    unet.report("denoising", 1, 20)
    clock.now += 4
    unet.end("decoding")
    clock.now += 8
    board.open_entry("a", tokenizer.ticket).end("done")
    record = view.record()
    assert record.times.seconds() == {"text": 1, "queue": 2, "denoise": 4, "decode": 8, "total": 15}
    assert (record.reason, record.deadline_unix_us) == ("ok", 7)


@pytest.mark.parametrize(
    ("parts", "seconds"),
    [
        (0, {"text": 1, "total": 1}),
        (1, {"text": 1, "queue": 1, "total": 2}),
        (2, {"text": 1, "queue": 1, "denoise": 1, "total": 3}),
        (3, {"text": 1, "queue": 1, "denoise": 1, "decode": 1, "total": 4}),
    ],
)
def test_a_request_that_ends_early_has_the_times_of_the_parts_that_it_came_to(board, clock, parts, seconds):
    entry = board.create_entry("a")
    for step in (entry.enter_queue, entry.start_denoising, lambda: entry.end("decoding"))[:parts]:
        clock.now += 1
        step()
    clock.now += 1
    ending = board.open_entry("a", entry.ticket) if parts == 3 else entry
    assert ending.record.times.seconds() == {}, "while it is live"
    ending.end("failed", "DEADLINE")
    assert ending.record.times.seconds() == seconds
    assert ending.record.reason == "DEADLINE"


def test_no_stage_ends_what_another_has_ended(board):
    entry = board.create_entry("a")
    board.open_entry("a", entry.ticket).end("cancelled")
    assert board.open_entry("a", entry.ticket).ticket == 0
    assert board.status(b"a") == JobStatus("cancelled")


def test_a_request_is_found_by_its_id_alone_unless_two_have_it(board):
    entry = board.create_entry("a")
    assert board.find_entry("a").ticket == entry.ticket
    assert board.find_entry("b").ticket == board.find_entry("").ticket == 0
    board.create_entry("a")
    assert board.find_entry("a").ticket == 0, "which of them is meant can't be told"
    entry = board.create_entry("c")
    entry.end("done")
    assert board.find_entry("c").ticket == 0


def test_a_view_shows_what_other_processes_write_also_after_the_file_was_removed(board, other_process):
    entry = board.create_entry("a")
    view = entry.view()
    assert (view.record().status, view.is_cancelled()) == (JobStatus("queued"), False)
    other_process.open_entry("a", entry.ticket).report("denoising", 3, 20)
    other_process.cancel(b"a")
    assert (view.record().status, view.is_cancelled()) == (JobStatus("denoising", 3, 20), True)
    stage = other_process.open_entry("a", entry.ticket)
    board.remove()
    stage.end("cancelled")
    assert view.record().status.state == "cancelled"
    view.close()
