"""A lock for run folders. It ensures that only one run at a time writes to a folder."""

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
_held: set[int] = set()  # file descriptors of the lock files that this process has open


def _close_inherited() -> None:
    """Close the inherited lock files in a forked process. Otherwise, a child would keep the locks of a killed parent."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Lock `folder` for the duration of the block, by calling flock on a file in it.

    Yield a string that identifies this process. `lock_owner` returns the same string in other processes.

    If the process is killed, the operating system releases the lock. Warn if the operating system or the file system does not
    support locks.

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
        os.fsync(file)  # makes the string visible to other machines
        yield owner
    finally:
        with suppress(OSError):  # Windows cannot remove open files
            path.unlink()
        _held.discard(file)
        os.close(file)


def lock_owner(folder: Path) -> str:
    """Return a string that identifies the process that last locked `folder`, or an empty string if there is no lock file."""
    with suppress(OSError):
        return (folder / LOCK).read_text(errors="replace")
    return ""


def _opened(path: Path) -> int:
    """Open and lock the file at `path`, and return its descriptor."""
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
        os.close(file)  # the previous owner removed the file after it was opened here, so lock the new file


def _lock(file: int, path: Path) -> None:
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = lock_owner(path.parent).partition(",")[0] or "another process"
        raise UserError(f"--output: {owner} is writing to {path.parent}: wait until it ends, or name another folder") from error
    except OSError as error:
        warnings.warn(
            f"{path.parent} cannot be locked ({error}): do not start a second run in it", RuntimeWarning, stacklevel=2
        )
