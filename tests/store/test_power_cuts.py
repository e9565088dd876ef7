"""The power goes at every operation of a save, on real file systems: what was acknowledged is there afterwards."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, Facts, Holder, commit, stream
from elastic_fit.supervisor.store.generation import take_generation
from tests.filesystems import JOURNAL_FLUSHED, NOTHING_FLUSHED, FileSystem
from tests.store.aftermath import Tally
from tests.store.disks import CountingDisk, Killed
from tests.store.stories import STORIES, Story, replacing, store_in

pytestmark = pytest.mark.system


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
    system = FileSystem(request.param, tmp_path, tmp_path / "mount")
    yield system
    system.umount()


@pytest.mark.parametrize("flags", [NOTHING_FLUSHED, JOURNAL_FLUSHED], ids=["nothing flushed", "journal flushed"])
@pytest.mark.parametrize("name", STORIES)
def test_a_power_cut_at_every_operation_loses_nothing(name: str, flags: int, system: FileSystem, tally: Tally) -> None:
    cut_everywhere(STORIES[name], flags, system, tally)


@pytest.mark.parametrize("flags", [NOTHING_FLUSHED, JOURNAL_FLUSHED], ids=["nothing flushed", "journal flushed"])
def test_a_power_cut_at_every_write_of_a_file_of_several_buffers_loses_nothing(
    flags: int, system: FileSystem, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of it is on the disk by then: each buffer is sent there as soon as it is full. Here buffers are small."""
    for module in (stream, commit):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(stream, "PIECE_BYTES", 16 << 10)
    done = cut_everywhere(replacing(piece=50_000), flags, system, tally)
    assert done.count("write") > 9


def cut_everywhere(story: Story, flags: int, system: FileSystem, tally: Tally) -> list[str]:
    """Cut the power before each operation of the story's act, and after the last one; returns the operations."""
    whole = CountingDisk()
    story.prepare(store_in(system.root / "whole"))
    story.act(store_in(system.root / "whole", whole))
    for number in range(1, len(whole.done) + 1):
        assert not is_acknowledged(story, number, flags, system, tally)
    assert is_acknowledged(story, len(whole.done) + 1, flags, system, tally)
    return whole.done


def is_acknowledged(story: Story, number: int, flags: int, system: FileSystem, tally: Tally) -> bool:
    """Whether it was before the power went, at operation `number`; afterwards what has to be true then is true."""
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
    return acknowledged


def test_a_generation_outlives_a_power_cut(system: FileSystem) -> None:
    """Else its number would be given twice, and fence off nobody."""
    run = RunDir(system.root / "run")
    for number in (1, 2, 3):
        assert take_generation(run.generations, Holder.this_process()) == number
        system.cut(NOTHING_FLUSHED)
        system.come_back()


def test_a_large_save_leaves_the_page_cache_to_others(system: FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "CACHED_BYTES", 16 << 20)
    saved = save(system.root, "large.ckpt", 96 << 20)
    assert cached_bytes(saved) == 16 << 20


def test_a_small_save_is_in_the_page_cache_for_a_restart_to_find(system: FileSystem) -> None:
    saved = save(system.root, "small.ckpt", 20 << 20)
    assert cached_bytes(saved) == 20 << 20


def save(root: Path, name: str, size: int) -> Path:
    with CheckpointStore(root).stage(name) as staged:
        with staged.open() as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        staged.commit(Facts(step=1))
    return root / name


def cached_bytes(path: Path) -> int:
    """How much of a file is in memory; by looking, not by reading."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as view:
        start = ctypes.c_char.from_buffer(view)
        assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(size), pages) == 0
        del start
    return sum(page & 1 for page in pages) * mmap.PAGESIZE
