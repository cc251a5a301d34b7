"""One process at a time, where two would do the same work twice."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger("spectralkv")


@contextmanager
def one_process(path: str | os.PathLike, waiting: str | None = None) -> Iterator[None]:
    """Wait until no other process is in here with the lock file `path`, which is made as needed and stays.

    waiting: said once where there is one. A process that ends, however it does, lets the next one in. Where the file system
    has no locks, or cannot be written, nobody waits.
    """
    handle = None
    with suppress(OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if handle is not None:
            _wait(handle, waiting)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _wait(handle: int, waiting: str | None) -> None:
    with suppress(ImportError, OSError):
        import fcntl  # not there on Windows

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                log.warning("%s", waiting)
            fcntl.flock(handle, fcntl.LOCK_EX)
