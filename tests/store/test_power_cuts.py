"""The power goes at every operation of a save, on real file systems: what was acknowledged is there afterwards."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import Holder
from elastic_fit.supervisor.store.generation import take_generation
from tests.store.aftermath import Tally
from tests.store.disks import CountingDisk, Killed
from tests.store.stories import STORIES, store_in

pytestmark = pytest.mark.system

SHUTDOWN = 0x8004587D
NOTHING_FLUSHED, JOURNAL_FLUSHED = 2, 1
"""What was not synced is gone; or the names are there, and the bytes are gone."""


class FileSystem:
    """A file system in an image, whose power can be cut."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind, self._image, self.root = kind, folder / f"{kind}.img", folder / "mount"
        self.root.mkdir()
        with self._image.open("wb") as file:
            file.truncate(320 << 20)
        subprocess.run([f"mkfs.{kind}", "-q", str(self._image)], check=True)
        self.mount()

    def mount(self) -> None:
        # The dead one may live on in another mount namespace; its twin must be taken for what it is.
        options = "loop,nouuid" if self._kind == "xfs" else "loop"
        subprocess.run(["mount", "-o", options, str(self._image), str(self.root)], check=True)

    def umount(self) -> None:
        subprocess.run(["umount", str(self.root)], check=True)

    def cut(self, flags: int) -> None:
        """From now on, nothing reaches the disk."""
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", flags))
        finally:
            os.close(descriptor)

    def come_back(self) -> None:
        """The power is back: mount, which recovers the journal."""
        self.umount()
        in_use = subprocess.run(["losetup", "-j", str(self._image)], check=True, capture_output=True).stdout
        if in_use:
            # Whoever has made a mount namespace meanwhile (hosts of other tests) has kept the dead file system.
            copy = self._image.with_name(f"{self._image.stem}+.img")
            subprocess.run(["cp", "--sparse=always", str(self._image), str(copy)], check=True)
            self._image = copy
        self.mount()


class PowerCutAt(CountingDisk):
    """The power goes before operation `number`."""

    def __init__(self, number: int, system: FileSystem, flags: int) -> None:
        super().__init__()
        self._number, self._system, self._flags = number, system, flags

    def before(self, number: int, operation: str) -> None:
        if number == self._number:
            self._system.cut(self._flags)
        if number >= self._number:
            raise Killed


@pytest.fixture(params=["ext4", "xfs"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileSystem]:
    system = FileSystem(request.param, tmp_path)
    yield system
    system.umount()


@pytest.mark.parametrize("flags", [NOTHING_FLUSHED, JOURNAL_FLUSHED], ids=["nothing flushed", "journal flushed"])
@pytest.mark.parametrize("name", STORIES)
def test_a_power_cut_at_every_operation_loses_nothing(name: str, flags: int, system: FileSystem, tally: Tally) -> None:
    story = STORIES[name]
    whole = CountingDisk()
    story.prepare(store_in(system.root / "whole"))
    story.act(store_in(system.root / "whole", whole))
    for number in range(1, len(whole.done) + 2):
        folder = system.root / str(number)
        story.prepare(store_in(folder))
        acknowledged = False
        try:
            story.act(store_in(folder, PowerCutAt(number, system, flags)))
            acknowledged = True
            system.cut(flags)
        except Killed:
            pass
        system.come_back()
        tally.survive(story, folder, acknowledged=acknowledged)
        shutil.rmtree(folder)
    assert acknowledged, "the last cut comes right after the acknowledgement"


def test_a_generation_outlives_a_power_cut(system: FileSystem) -> None:
    """Else its number would be given twice, and fence off nobody."""
    run = RunDir(system.root / "run")
    for number in (1, 2, 3):
        assert take_generation(run.generations, Holder.this_process()) == number
        system.cut(NOTHING_FLUSHED)
        system.come_back()
