"""The board's folder: private, not to be led astray by links, and removed once its server is dead."""

import os
import subprocess
import sys
from pathlib import Path

import job_folder
import pytest
from job_board import JobBoard
from job_folder import folder_of, private_folder, remove_folders_of_dead_servers


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(job_folder, "SHARED_MEMORY", tmp_path)
    return tmp_path


def test_the_folder_is_in_shared_memory_and_one_for_each_model_of_a_server():
    ours = folder_of("jobs", os.getpid())
    assert ours.parent == Path("/dev/shm")  # noqa: S108
    assert ours == folder_of("jobs", os.getpid())
    assert len({ours, folder_of("music_jobs", os.getpid()), folder_of("jobs", os.getppid())}) == 3


def test_a_symbolic_link_in_its_place_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (tmp_path / "board").symlink_to(victim)
    warnings: list[str] = []
    board = JobBoard(tmp_path / "board", warnings.append)
    assert board.create_entry("a").ticket == 0
    assert board.status(b"a").state == "unknown"
    board.remove()
    assert len(warnings) == 1
    assert list(victim.iterdir()) == []


def test_a_dangling_link_in_its_place_makes_nothing(tmp_path):
    (tmp_path / "board").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="board"), private_folder(tmp_path / "board", make=True):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_link_in_an_entry_s_place_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    warnings: list[str] = []
    board = JobBoard(tmp_path / "board", warnings.append)
    entry = board.create_entry("a")
    [file] = (tmp_path / "board").iterdir()
    file.rename(victim)
    file.symlink_to(victim)
    before = victim.read_bytes()
    assert board.cancel(b"a").state == "unknown"
    assert board.open_entry("a", entry.ticket).ticket == 0
    assert victim.read_bytes() == before


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_folder_in_which_others_have_a_part_is_refused(tmp_path, mode):
    (tmp_path / "board").mkdir()
    (tmp_path / "board").chmod(mode)
    with pytest.raises(PermissionError, match="isn't this user's alone: remove it"), private_folder(tmp_path / "board"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path):
    (tmp_path / "board").mkdir(mode=0o700)
    os.chown(tmp_path / "board", 12345, 12345)
    with pytest.raises(PermissionError, match="isn't this user's alone"), private_folder(tmp_path / "board"):
        pass


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "board").touch()
    with pytest.raises(NotADirectoryError), private_folder(tmp_path / "board", make=True):
        pass


def test_folders_of_dead_servers_are_removed_and_no_others(shared_memory):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server:
        dead = folder_of("jobs", server.pid)
        server.kill()
        server.wait()
    alive = folder_of("jobs", os.getpid())
    pid, started = alive.name.split("_")[3:5]
    same_id_again = alive.with_name(alive.name.replace(f"_{pid}_{started}_", f"_{pid}_{int(started) - 1}_"))
    other_namespace = dead.with_name(dead.name.replace("audioldm2_jobs_", "audioldm2_jobs_1"))
    strangers = [shared_memory / "audioldm2_jobs_", shared_memory / "sem.something", other_namespace]
    for folder in (dead, alive, same_id_again, *strangers):
        JobBoard(folder, print).create_entry("a")
    remove_folders_of_dead_servers()
    assert set(shared_memory.iterdir()) == {alive, *strangers}


def test_a_link_under_a_dead_servers_name_harms_nothing(shared_memory):
    victim = shared_memory / "victim"
    victim.mkdir()
    (victim / "file").touch()
    alive = folder_of("jobs", os.getpid())
    pid = alive.name.split("_")[3]
    alive.with_name(alive.name.replace(f"_{pid}_", f"_{2**22 + 1}_")).symlink_to(victim)
    remove_folders_of_dead_servers()
    assert (victim / "file").exists()
