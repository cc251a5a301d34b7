"""A folder for code that this user alone may write, and files in it that are whole.

What lies there is loaded into the process. So a folder that others could write is refused, and a file counts only with the
digest of its content beside it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..files.locking import one_process


class NotPrivate(OSError):
    """Somebody else could write a folder, or owns it."""


def private_folder(path: Path) -> Path:
    """Create the folder `path` for this user alone, or check that it is such a folder already.

    Raises NotPrivate for a folder of somebody else, or one that group or others may write, and OSError without a folder.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    link, folder = path.lstat(), path.stat()
    if {link.st_uid, folder.st_uid} != {os.geteuid()}:
        raise NotPrivate(f"{path} belongs to somebody else")
    if stat.S_IMODE(folder.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotPrivate(
            f"{path} can be written by others (chmod 700 makes it yours alone, after a look at what is there)"
        )
    return path


def ensure_file(path: Path, make: Callable[[Path], Path]) -> Path:
    """The file `path` of a private folder, made by `make` unless it is there and whole.

    `make` takes an empty folder and returns the file that it wrote there. Of several processes one makes the file.
    """
    if is_whole(path):
        return path
    with one_process(path.parent / ".lock"), tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as work:
        if not is_whole(path):  # somebody else made it while this process waited
            made = make(Path(work))
            digest = Path(work) / "digest"
            digest.write_text(_digest(made) + "\n")
            os.replace(made, path)
            os.replace(digest, digest_path(path))
    return path


def is_whole(path: Path) -> bool:
    """Whether a file is there with the content that it was made with."""
    try:
        return digest_path(path).read_text().strip() == _digest(path)
    except (OSError, UnicodeDecodeError):
        return False


def digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
