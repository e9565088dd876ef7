"""What a folder of checkpoints may look like for us to believe what is in it, and reading that never leaves it.

A checkpoint may hold code (a pickle), so whoever can write one can run a program as whoever resumes from it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from elastic_fit.supervisor.errors import StorageError

NOBODY = 65534
"""Whom root's files belong to on a network file system that maps root to nobody."""


class UntrustedFolder(StorageError):
    """Somebody else may have written what is in the folder."""


class UntrustedFile(StorageError):
    """A file is none that we would have written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} {why}")
        self.why = why


def check_folder(folder: Path) -> None:
    """Raise UntrustedFolder where others may write into `folder`; one that isn't there is fine.

    In a folder with the sticky bit, such as ``/tmp``, others can add files but not replace ours: there each file's
    owner counts (`distrust`).
    """
    try:
        status = folder.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"can't look at {folder}: {error.strerror}") from error
    sticky = bool(status.st_mode & stat.S_ISVTX)
    if status.st_mode & stat.S_IWOTH and not sticky:
        raise UntrustedFolder(
            f"everybody may write into {folder}: nothing in it can be believed",
            hint=f"chmod o-w {folder}, or use a folder inside of it",
        )
    if not sticky and (why := _foreign(status)):
        raise UntrustedFolder(f"{folder} {why}", hint="use a folder of your own, or chown it")


def distrust(status: os.stat_result, *, may_have_links: bool = False) -> str | None:
    """Why a file or a folder of a checkpoint can't be believed, or None."""
    if why := _foreign(status):
        return why
    if status.st_mode & stat.S_IWOTH:
        return "may be written by everybody"
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and not may_have_links:
        return f"has {status.st_nlink} names (hard links): it may be changed from elsewhere"
    return None


def _foreign(status: os.stat_result) -> str | None:
    me = os.geteuid()
    trusted = {me, 0, *([NOBODY] if me == 0 else [])}
    return None if status.st_uid in trusted else f"belongs to another user (uid {status.st_uid})"


def open_below(root: Path, relative: str) -> int:
    """A descriptor, to read from, of a file below `root`, or of `root` itself; no link is followed on the way.

    Raises OSError: ELOOP or ENOTDIR where there is a link.
    """
    *folders, name = (root.name, *relative.split("/")) if relative else (root.name,)
    at = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)


def read_small(root: Path, relative: str, most: int, *, may_have_links: bool = False) -> bytes:
    """What is in a file of up to `most` bytes below `root`, or in `root` itself.

    Nothing is waited for, as a FIFO would be. Raises UntrustedFile where it is larger, not a plain file, or one that
    somebody else may have written; OSError as `open_below` does.
    """
    descriptor = open_below(root, relative)
    try:
        if why := _why_not_small(os.fstat(descriptor), most, may_have_links=may_have_links):
            raise UntrustedFile(root / relative, why)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def _why_not_small(status: os.stat_result, most: int, *, may_have_links: bool) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "is not a plain file"
    if status.st_size > most:
        return f"is larger than {most} bytes"
    return distrust(status, may_have_links=may_have_links)


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below `root` but folders, by its path relative to it, with its status; links are not followed."""
    for folder, _, names, at in os.fwalk(root, follow_symlinks=False):
        prefix = Path(folder).relative_to(root)
        for name in names:
            yield (prefix / name).as_posix(), os.stat(name, dir_fd=at, follow_symlinks=False)
