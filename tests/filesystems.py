"""Real file systems, each in an image of its own, that can be made to refuse: for tests that may mount (as root)."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from pathlib import Path

SHUTDOWN = 0x8004587D
NOTHING_FLUSHED, JOURNAL_FLUSHED = 2, 1
"""What was not synced is gone; or the names are there, and the bytes are gone."""


class FileSystem:
    """A file system of that kind, mounted at `root`, its image in `folder`."""

    def __init__(self, kind: str, folder: Path, root: Path) -> None:
        self._kind, self.root = kind, root
        self._image = folder / f"{kind}.img"
        self.root.mkdir(parents=True, exist_ok=True)
        with self._image.open("wb") as file:
            file.truncate(320 << 20)
        _run(f"mkfs.{kind}", "-q", str(self._image))
        self.mount()

    def mount(self) -> None:
        # The dead one may live on in another mount namespace; its twin must be taken for what it is.
        options = {"xfs": "loop,nouuid", "ext4": "loop,errors=remount-ro"}.get(self._kind, "loop")
        _run("mount", "-o", options, str(self._image), str(self.root))

    def umount(self) -> None:
        _run("umount", str(self.root))

    def cut(self, flags: int) -> None:
        """The power goes: from now on, nothing reaches the disk, and whoever asks gets EIO. For ext4 and xfs."""
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", flags))
        finally:
            os.close(descriptor)

    def find_an_error(self) -> None:
        """An ext4 that has found itself damaged takes no more: from now on, whoever writes gets EROFS."""
        device = os.path.basename(_run("losetup", "-j", str(self._image), "-n", "-O", "NAME").strip())
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a test wanted it")

    def begin_quota(self, size: str) -> None:
        """No more than that may be stored in a btrfs: from now on, whoever wants more gets EDQUOT, root as well."""
        _run("btrfs", "quota", "enable", str(self.root))
        _run("btrfs", "qgroup", "limit", size, str(self.root))

    def end_quota(self) -> None:
        """There is room again. (To raise the limit is a change, for which there may be no room.)"""
        _run("btrfs", "quota", "disable", str(self.root))

    def come_back(self) -> None:
        """The power is back: mount, which recovers the journal."""
        self.umount()
        if _run("losetup", "-j", str(self._image)):
            # Whoever has made a mount namespace meanwhile (hosts of other tests) has kept the dead file system.
            copy = self._image.with_name(f"{self._image.stem}+.img")
            _run("cp", "--sparse=always", str(self._image), str(copy))
            self._image = copy
        self.mount()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
