"""One process at a time mines one part into one folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tl_contextmix.errors import InvalidInput, bad

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds a lock file; the system lets go of it when the process ends, however it ends.

    It is made first of all, so that a folder that cannot be written to is found out before a
    forward pass and not after the last one.

    Args:
        path: The lock file. It is gone afterwards.

    Raises:
        InvalidInput: If another process holds it, or it cannot be made.
    """
    handle = _taken(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)


def _taken(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _refused(path, str(error), "a folder with the right to write") from error
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise _refused(path, "another process at it", "one process for each part") from error
        except OSError:  # a file system without locks
            return handle
        # What was opened may have been removed before it was locked.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)


def _refused(path: Path, seen: str, expected: str) -> InvalidInput:
    return bad(
        f"{path.parent} cannot be mined into",
        seen,
        expected,
        "Wait for the other process, or choose another folder.",
    )
