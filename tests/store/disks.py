"""Disks on which things go wrong, at one operation or from one on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import Disk, GenerationFence


class Killed(BaseException):
    """The process is gone: nothing that it would have done next is done."""


class CountingDisk(Disk):
    """Counts what changes the disk, and asks `before` each time."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._paths: dict[int, Path] = {}
        self.synced: list[Path] = []

    def before(self, number: int, operation: str) -> None:
        """Called before operation `number`, from 1."""

    def count(self, operation: str) -> None:
        """One operation more."""
        self.done.append(operation)
        self.before(len(self.done), operation)

    def create(self, path: Path) -> int:
        self.count("create")
        descriptor = super().create(path)
        self._paths[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self.count("write")
        return super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self.synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        self.count("sync")
        super().sync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self.count("rename")
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self.count("link")
        super().link(source, target)

    def symlink(self, text: str, path: Path) -> None:
        self.count("symlink")
        super().symlink(text, path)

    def unlink(self, path: Path) -> None:
        self.count("unlink")
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self.count("mkdir")
        super().mkdir(path)

    def rmdir(self, path: Path) -> None:
        self.count("rmdir")
        super().rmdir(path)


class FenceOn(GenerationFence):
    """A fence whose tickets are on the same disk: to read them is an operation like any other."""

    def __init__(self, disk: CountingDisk, folder: RunDir, generation: int) -> None:
        super().__init__(folder, generation)
        self._disk = disk

    def check(self) -> None:
        self._disk.count("check")
        super().check()


class KilledAt(CountingDisk):
    """The process dies before operation `number`; of a write, half is done."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def before(self, number: int, operation: str) -> None:
        if number >= self._number:
            raise Killed

    def write(self, descriptor: int, data: memoryview) -> int:
        if len(self.done) + 1 == self._number:
            os.write(descriptor, data[: len(data) // 2])
        return super().write(descriptor, data)


class FailingAt(CountingDisk):
    """Operation `number` fails with an error, and with `for_good`, everything after it does too."""

    def __init__(self, number: int, error: int, *, for_good: bool = False) -> None:
        super().__init__()
        self._number, self._error, self._for_good = number, error, for_good

    def before(self, number: int, operation: str) -> None:
        if number == self._number or (self._for_good and number > self._number):
            raise OSError(self._error, os.strerror(self._error))


class InterruptedAt(CountingDisk):
    """Something else happens before operation `number`."""

    def __init__(self, number: int, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._number, self._meanwhile = number, meanwhile

    def before(self, number: int, operation: str) -> None:
        if number == self._number:
            self._meanwhile()


class ShortWrites(CountingDisk):
    """Each write takes a part only."""

    def write(self, descriptor: int, data: memoryview) -> int:
        return super().write(descriptor, data[: max(1, len(data) // 3)])
