"""A supervisor that was paused, for however long and between whichever two system calls, does no harm when it wakes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from elastic_fit.supervisor.errors import FencedOff
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, Disk, GenerationFence, Holder, SaveFailed
from elastic_fit.supervisor.store.generation import take_generation
from tests.store.aftermath import Tally
from tests.store.disks import CountingDisk, InterruptedAt, Killed
from tests.store.stories import STORIES, is_intact, save


def supervisor(run: RunDir, disk: Disk | None = None) -> CheckpointStore:
    """The store of one that has just taken the run over: the next generation, then a sweep."""
    generation = take_generation(run.generations, Holder.this_process())
    store = CheckpointStore(run.checkpoints, fence=GenerationFence(run, generation), disk=disk, generation=generation)
    store.sweep()
    return store


def operations(name: str, run: RunDir) -> int:
    disk = CountingDisk()
    STORIES[name].prepare(supervisor(run))
    STORIES[name].act(supervisor(run, disk))
    return len(disk.done)


def newest(run: RunDir) -> int | None:
    chosen = CheckpointStore(run.checkpoints).latest_valid().chosen
    assert chosen is None or is_intact(chosen)
    return chosen.manifest.step if chosen else None


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize("other_name", [False, True], ids=["same name", "another name"])
def test_whenever_the_old_one_wakes_what_the_new_one_acknowledged_stays(
    name: str, other_name: bool, memory: Path, tally: Tally
) -> None:
    story = STORIES[name]
    contested = "last.ckpt" if "last.ckpt" in story.names and "swap" not in name else f"step={story.after}.ckpt"
    taken = "step=30.ckpt" if other_name else contested
    for number in range(1, operations(name, RunDir(memory / "whole")) + 1):
        run = RunDir(memory / str(number))
        story.prepare(supervisor(run))
        selected: list[int | None] = []

        def take_over(run: RunDir = run, selected: list[int | None] = selected) -> None:
            new = supervisor(run)
            selected.append(newest(run))
            save(new, 30, taken, generation=9)

        old = supervisor(run, InterruptedAt(number, take_over))
        with contextlib.suppress(FencedOff):
            story.act(old)
        with tally.state():
            assert selected[0] in {story.before, story.after}, "and what it went on from was whole"
            assert newest(run) == 30, "the new one's checkpoint is the one that counts"
            with pytest.raises(FencedOff):
                save(old, 40)
            assert newest(run) == 30


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.system if "folder" in name else ()) for name in STORIES]
)
def test_an_old_one_that_dies_as_it_wakes_leaves_what_the_next_start_needs(
    name: str, memory: Path, tally: Tally
) -> None:
    """Paused before one operation, killed before a later one, with a takeover in between."""
    story = STORIES[name]
    total = operations(name, RunDir(memory / "whole"))
    for paused in range(1, total + 1):
        for killed in range(paused + 1, total + 1):
            run = RunDir(memory / f"{paused}-{killed}")
            story.prepare(supervisor(run))
            disk = DiesAfterWaking(paused, killed, lambda run=run: save(supervisor(run), 30, generation=9))
            with contextlib.suppress(FencedOff, Killed):
                story.act(supervisor(run, disk))
            with tally.state():
                supervisor(run)
                assert newest(run) == 30


class DiesAfterWaking(InterruptedAt):
    def __init__(self, paused: int, killed: int, meanwhile: object) -> None:
        super().__init__(paused, meanwhile)  # type: ignore[arg-type]
        self._killed = killed

    def before(self, number: int, operation: str) -> None:
        super().before(number, operation)
        if number >= self._killed:
            raise Killed


def test_folder_that_is_not_the_one_that_a_worker_was_given_gets_no_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    store = supervisor(run)
    save(store, 10)
    (tmp_path / "run").rename(tmp_path / "unmounted")
    (tmp_path / "run").mkdir()
    with pytest.raises(SaveFailed, match="is gone"):
        save(store, 20)
    assert not list(run.checkpoints.rglob("*.manifest.json"))
    (tmp_path / "run").rename(tmp_path / "empty")
    (tmp_path / "unmounted").rename(tmp_path / "run")
    save(store, 30)
    assert newest(run) == 30
