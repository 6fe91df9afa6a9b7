"""The lock on the folder of a run: one run at a time writes to it."""

from __future__ import annotations

import os
import socket
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .config import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

LOCK = ".lock"
_held: set[int] = set()  # file descriptors


def _close_inherited() -> None:
    """A fork has the lock of its parent, and would keep it when the parent is killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Lock `folder` for the time of the block, by flock on a file in it; yields what `lock_owner` reads there.

    The operating system ends the lock with the process. A file system without locks gets a warning.

    Raises:
        UserError: another run has the lock.
        OSError: the lock file cannot be written.
    """
    path, owner = folder / LOCK, f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4()}"
    file = _opened(path)
    _held.add(file)
    try:
        os.ftruncate(file, 0)
        os.write(file, owner.encode())
        os.fsync(file)  # other machines read it
        yield owner
    finally:
        with suppress(OSError):  # Windows keeps files that are open
            path.unlink()
        _held.discard(file)
        os.close(file)


def lock_owner(folder: Path) -> str:
    """The process that has locked `folder` last, and a unique number; empty without a lock file."""
    with suppress(OSError):
        return (folder / LOCK).read_text(errors="replace")
    return ""


def _opened(path: Path) -> int:
    """The lock file at `path`, locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file, path)
            if os.fstat(file).st_ino == os.stat(path).st_ino:
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its last owner has removed it after it was opened here: lock the file that is there now


def _lock(file: int, path: Path) -> None:
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = lock_owner(path.parent).partition(",")[0] or "another process"
        raise UserError(f"--output: {owner} is training in {path.parent}: wait for its end, or name another folder") from error
    except OSError as error:
        warnings.warn(
            f"{path.parent} cannot be locked ({error}): do not start a second run in it", RuntimeWarning, stacklevel=2
        )
