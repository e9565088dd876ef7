"""What the store does to a disk, one system call a method, and the names of what is no checkpoint yet, or any more."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import secrets
import socket
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from elastic_fit.supervisor.store.manifest import SUFFIX

TEMPORARY = ".tmp-"
DELETING = ".del-"
PART = ".part-"
"""One rank's part of a checkpoint that others will put together."""
CLAIM = ".claim-"
"""Says who puts parts together: a symlink, to the token of that process."""

_HIDDEN = re.compile(
    r"\.(?P<name>.+)(?P<state>\.(?:tmp|del|part|claim)-)(?P<token>[0-9a-z-]+)(?P<suffix>\.manifest\.json)?", re.DOTALL
)
_TOKEN = re.compile(r"(?P<generation>\d{1,18})(?:-(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,18}))?-[0-9a-z-]+")

SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = ctypes.CDLL(None).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Disk:
    """What the protocol does to the disk; replaced in tests to make one call fail, or the last one that is made."""

    def create(self, path: Path) -> int:
        """A descriptor of a new file that nobody else has made."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`; returns how many bytes."""
        return os.write(descriptor, data)

    def begin_writeback(self, descriptor: int, start: int, length: int) -> None:
        """Have the kernel begin to write that part to the device, so that less is left for `sync`."""
        # Its answer is of no use: an error of the device is told by the sync.
        _sync_file_range(descriptor, start, length, SYNC_FILE_RANGE_WRITE)

    def let_go(self, descriptor: int, start: int, length: int) -> None:
        """Have the kernel's cache drop what of that part is on the device already."""
        with contextlib.suppress(OSError):  # a file system that takes no advice
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)

    def sync(self, descriptor: int) -> None:
        """Force the file, or the folder, to the device."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give it its name."""
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, which must be free."""
        os.link(source, target, follow_symlinks=False)

    def symlink(self, text: str, path: Path) -> None:
        """Make a symlink."""
        os.symlink(text, path)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make a folder."""
        os.mkdir(path, 0o700)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def sync_folder(self, path: Path) -> None:
        """Force a folder's names to the device."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def free_bytes(self, path: Path) -> int | None:
        """What may still be written below `path`; None where the file system doesn't say."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize if status.f_blocks else None


def make_folders(path: Path, disk: Disk) -> None:
    """Make a folder and those above it, and force their names to the device."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            disk.mkdir(folder)
        except FileExistsError:
            continue  # another rank was quicker
        disk.sync_folder(folder.parent)


def remove_tree(path: Path, disk: Disk) -> None:
    """Remove a file or a folder without following links; nothing happens where there is none."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        disk.unlink(path)
        return
    for entry in sorted(os.listdir(path)):
        remove_tree(path / entry, disk)
    disk.rmdir(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, which the kernel lets go of where its holder dies; whether there is one.

    Some file systems have none, and on others each host has its own: it says nothing of processes on other hosts.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        is_locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def exists(path: Path) -> bool:
    """Whether there is something of that name, be it a broken link. Raises OSError where that can't be told."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """The part of a name that tells who has given it."""

    generation: int
    is_local: bool
    """Whether the process is, or was, one of this host."""
    writer_is_dead: bool
    """Whether it is certain that the process is gone."""

    @classmethod
    def parse(cls, text: str) -> Token | None:
        """From the text; None where it isn't one."""
        found = _TOKEN.fullmatch(text)
        if found is None:
            return None
        is_local = found["host"] == _host()
        is_dead = is_local and not psutil.pid_exists(int(found["pid"]))
        return cls(generation=int(found["generation"]), is_local=is_local, writer_is_dead=is_dead)

    def is_nobodys(self, generation: int) -> bool:
        """Whether what has this name may be swept by `generation`, which holds the run."""
        return self.generation < generation or self.writer_is_dead


def new_token(generation: int) -> str:
    """A token of this process, never used before."""
    return f"{generation}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """What is no checkpoint: one that is being written or deleted, its manifest, a part of it, or a claim to those."""

    name: str
    """The checkpoint's name."""
    token: Token
    is_manifest: bool
    state: str
    """`TEMPORARY`, `DELETING`, `PART` or `CLAIM`."""

    @classmethod
    def parse(cls, entry: str) -> Hidden | None:
        """From its name in the folder; None for a name of another kind."""
        found = _HIDDEN.fullmatch(entry)
        token = Token.parse(found["token"]) if found else None
        if found is None or token is None:
            return None
        return cls(name=found["name"], token=token, is_manifest=found["suffix"] == SUFFIX, state=found["state"])


def hidden_path(target: Path, state: str, generation: int) -> Path:
    """A free name beside `target` that tells what it is (`TEMPORARY`, `DELETING`), and who may sweep it."""
    return target.with_name(f".{target.name}{state}{new_token(generation)}")


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"
