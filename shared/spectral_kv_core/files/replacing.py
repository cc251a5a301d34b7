"""Files that are written whole or not at all: under a temporary name, which then takes the place of the old one.

An existing file keeps its mode, a new one gets what the umask leaves, or is for its owner alone. A symbolic link stays, and
what it points to is replaced. What processes that were killed left behind goes at the next save of the same file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from io import BufferedWriter
from pathlib import Path

from ..errors import UsageError

SUFFIX = ".part"
YOUNG = 60.0  # seconds; a leftover that is younger may have a writer that has not locked it yet
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, private: bool = False, size: int | None = None) -> Iterator[BufferedWriter]:
    """A temporary file beside `path`, for the block to write to, which replaces it at the end; folders are made as needed.

    private: a new file can be read by its owner alone. size: bytes that will be written, where they are known, for the
    message of a full disk. Raises UsageError for a path that is there and no regular file, and OSError that says how many
    bytes are needed where the disk is full.
    """
    real = Path(os.path.realpath(path))
    mode = _mode_of(real)
    real.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(real)
    temporary = real.with_name(f".{real.name}.{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle = os.open(temporary, flags, 0o600 if private or mode is not None else 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            _lock(handle)
            yield file
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, real)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise_if_full(error, path, size, "Nothing was saved, and what was there before is as it was.")
        raise


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with replacing(path, size=len(content)) as file:
        file.write(content)


def raise_if_full(error: BaseException, path: str | os.PathLike, size: int | None, then: str) -> None:
    """Raise OSError with the file, the bytes needed and what to do, where `error` is one of a full disk."""
    if getattr(error, "errno", None) not in FULL:
        return
    needed = "room" if size is None else f"room for {size:,} bytes"
    free = shutil.disk_usage(os.path.dirname(os.path.realpath(path))).free
    raise OSError(
        f"Expected {needed} for {path}, the disk or the quota is full ({free:,} bytes are free). Free some, or name another "
        f"place. {then}"
    ) from error


def _mode_of(path: Path) -> int | None:
    """The mode of an existing file, None without one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"Expected a file to write to, {path} is a folder, a pipe or a device. Name another file.")
    return stat.S_IMODE(found.st_mode)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` whose writers are gone; what cannot be removed stays."""
    beginning, entries = f".{path.name}.", []
    with contextlib.suppress(OSError):  # a folder that can be written may be none that can be listed
        entries = list(os.scandir(path.parent))
    for entry in entries:
        if not (entry.name.startswith(beginning) and entry.name.endswith(SUFFIX)):
            continue
        with contextlib.suppress(ImportError, OSError):
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > YOUNG and not _is_locked(entry.path):
                os.unlink(entry.path)


def _lock(handle: int) -> None:
    """Show others that a writer is alive; it ends with the process. File systems without locks go by age alone."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl  # not there on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_locked(path: str) -> bool:
    import fcntl

    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
