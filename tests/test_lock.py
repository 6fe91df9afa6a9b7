"""Tests of the lock on a run folder."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from test_checkpoint import TINY, numbered

from vix_kernels.__main__ import main
from vix_kernels.training import UserError, lock, run
from vix_kernels.training.checkpoint import load_checkpoint, save_checkpoint
from vix_kernels.training.lock import locked
from vix_kernels.training.parallel import Ranks

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="no flock on this system")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    """The second run must fail before it deletes or writes files. The first run may still be writing a temporary file."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path / "old" / "last.pt", numbered(1), Ranks())
    for flag, folder in (("--output", tmp_path / "new"), ("--resume", tmp_path / "old")):
        (folder / ".last.pt.1.tmp").write_text("half")
        with locked(folder):
            before = names(folder)
            assert f"process {os.getpid()} on " in (line := refused(flag, folder)) and f"is writing to {folder}" in line
            assert names(folder) == before
        assert names(folder) == before - {lock.LOCK}


def test_a_run_holds_the_lock_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(self: run.Run) -> None:
        assert self.output == tmp_path / "run" and load_checkpoint(self.output)
        with pytest.raises(UserError, match="is writing to"), locked(self.output):
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "go", go)
    assert main(["train", "--output", str(tmp_path / "run"), *TINY]) == 130
    assert names(tmp_path / "run") == {"last.pt", "args.yaml"}


def test_the_loser_of_a_race_for_a_new_folder_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """Another run creates the folder and ends while this run is still being set up."""
    folder = tmp_path / "run"
    build_model = run.build_model

    def slow(*args: object) -> object:
        folder.mkdir()
        (folder / "last.pt").write_text("the other's")
        return build_model(*args)

    monkeypatch.setattr(run, "build_model", slow)
    assert "contains a run" in refused("--output", folder, *TINY)
    assert names(folder) == {"last.pt"} and (folder / "last.pt").read_text() == "the other's"


def test_a_new_folder_that_stays_empty_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "save_checkpoint", full)
    with pytest.raises(SystemExit):
        main(["train", "--output", str(tmp_path / "run"), *TINY])
    assert not names(tmp_path)


def test_a_killed_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """The lock is released even if a forked process, such as a DataLoader worker, is still running."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            worker = os.fork()
            if worker == 0:
                signal.pause()
            os.write(writing, str(worker).encode())
            signal.pause()
    worker = int(os.read(reading, 100))
    try:
        with pytest.raises(UserError, match=f"process {child} on "), locked(tmp_path):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert names(tmp_path) == {lock.LOCK}
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
    assert not names(tmp_path)


def test_a_lock_file_removed_by_its_owner_is_not_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, removed = lock.fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not removed:
            removed.append((tmp_path / lock.LOCK).unlink())
        flock(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with locked(tmp_path) as owner:
        assert removed and lock.lock_owner(tmp_path) == owner
        with pytest.raises(UserError, match="is writing to"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_gets_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with warnings.catch_warnings(record=True) as caught:
        assert main(["train", "--epochs", "1", "-b", "512", "--output", str(tmp_path), *TINY]) == 0
    assert [str(each.message) for each in caught if "lock" in str(each.message)] == [
        f"{tmp_path} cannot be locked ([Errno {errno.ENOLCK}] No locks available): do not start a second run in it"
    ]
