"""The process dies, or the disk refuses, at every single operation of a save: nothing acknowledged is ever lost."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, Facts, SaveFailed, verify
from elastic_fit.supervisor.store.generation import make_generations
from tests.store.aftermath import Tally
from tests.store.disks import CountingDisk, FailingAt, FenceOn, InterruptedAt, Killed, KilledAt, ShortWrites
from tests.store.stories import STORIES, is_intact, save, store_in

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)


def fenced(folder: Path, disk: CountingDisk) -> CheckpointStore:
    """As a worker's is. To ask the fence is an operation, too."""
    run = RunDir(folder)
    make_generations(run.generations)
    fence = FenceOn(disk, run, 1)
    return CheckpointStore(folder / "checkpoints", fence=fence, disk=disk, generation=1)


def operations(name: str, folder: Path, store: Callable[[Path, CountingDisk], CheckpointStore] = store_in) -> int:
    """How many operations the story's act takes."""
    disk = CountingDisk()
    STORIES[name].prepare(store_in(folder))
    STORIES[name].act(store(folder, disk))
    return len(disk.done)


@pytest.mark.parametrize("name", STORIES)
def test_a_process_that_dies_at_any_operation_loses_nothing(name: str, memory: Path, tally: Tally) -> None:
    story = STORIES[name]
    for number in range(1, operations(name, memory / "whole") + 1):
        folder = memory / str(number)
        story.prepare(store_in(folder))
        with pytest.raises(Killed):
            story.act(store_in(folder, KilledAt(number)))
        tally.survive(story, folder, acknowledged=False)


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_an_error_at_any_operation_is_told_and_loses_nothing(
    name: str, for_good: bool, memory: Path, tally: Tally
) -> None:
    story = STORIES[name]
    numbers = range(1, operations(name, memory / "whole", fenced) + 1)
    for number, error in itertools.product(numbers, ERRORS):
        folder = memory / f"{number}-{errno.errorcode[error]}"
        story.prepare(store_in(folder))
        disk = FailingAt(number, error, for_good=for_good)
        said = "acknowledged"
        try:
            story.act(fenced(folder, disk))
        except StorageError as failure:
            said = failure.message
        assert said == "acknowledged" or os.strerror(error) in said
        files = [path for path in disk.synced if path.is_file() or not path.exists()]
        assert len(files) == len(set(files)), "a file whose sync has failed is never synced again"
        tally.survive(story, folder, acknowledged=said == "acknowledged")


@pytest.mark.parametrize("name", [name for name in STORIES if "in place of another" in name])
def test_a_save_that_failed_gives_the_name_back_to_what_had_it(name: str, memory: Path) -> None:
    """A crash may leave it under another name till the next start; an error may not."""
    story = STORIES[name]
    for number in range(1, operations(name, memory / "whole", fenced) + 1):
        folder = memory / str(number)
        story.prepare(store_in(folder))
        store = fenced(folder, FailingAt(number, errno.EIO))
        with contextlib.suppress(SaveFailed):
            story.act(store)
        assert verify(store.root / "last.ckpt").valid
        assert (store.root / "last.ckpt").exists()


@pytest.mark.parametrize("name", STORIES)
def test_a_save_that_failed_once_can_be_made_again_by_the_same_process(name: str, memory: Path) -> None:
    story = STORIES[name]
    for number in range(1, operations(name, memory / "whole", fenced) + 1):
        folder = memory / str(number)
        story.prepare(store_in(folder))
        store = fenced(folder, FailingAt(number, errno.EIO))
        try:
            story.act(store)
        except StorageError:
            story.act(store)
        chosen = store.latest_valid().chosen
        assert chosen is not None
        assert chosen.manifest.step == story.after
        assert is_intact(chosen)


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """This process can open nothing; what it has open stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", STORIES)
def test_a_process_whose_descriptors_have_run_out_tells_it_and_loses_nothing(
    name: str, memory: Path, tally: Tally
) -> None:
    """It can't read its fence either, so it commits nothing; and what is told is that, not the fence."""
    story = STORIES[name]
    for number in range(1, operations(name, memory / "whole", fenced) + 1):
        folder = memory / str(number)
        story.prepare(store_in(folder))
        said = "acknowledged"
        with contextlib.ExitStack() as meanwhile:
            run_out = partial(meanwhile.enter_context, no_descriptors_left())
            try:
                story.act(fenced(folder, InterruptedAt(number, run_out)))
            except StorageError as failure:
                said = failure.message
        assert said == "acknowledged" or said.endswith("Too many open files")
        assert "generations" not in said
        tally.survive(story, folder, acknowledged=said == "acknowledged")


@pytest.mark.parametrize("name", STORIES)
def test_short_writes_are_gone_on_with(name: str, memory: Path) -> None:
    story = STORIES[name]
    story.prepare(store_in(memory))
    story.act(store_in(memory, ShortWrites()))
    chosen = store_in(memory).latest_valid().chosen
    assert chosen is not None
    assert is_intact(chosen)


class NothingTaken(CountingDisk):
    def write(self, descriptor: int, data: memoryview) -> int:
        return 0


def test_a_disk_that_takes_no_bytes_and_says_no_reason_does_not_hang_the_training(memory: Path) -> None:
    with pytest.raises(SaveFailed):
        save(store_in(memory, NothingTaken()), 10)


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "weights": torch.randn(50, 50, generator=generator), "moments": [torch.zeros(9) + step]}


def save_tensors(store: CheckpointStore, step: int) -> None:
    with store.stage(f"step={step}.ckpt") as staged:
        with staged.open() as file:
            torch.save(state(step), file)
        staged.commit(Facts(step=step))


@pytest.mark.parametrize("error", [None, errno.ENOSPC], ids=["killed", "full"])
def test_what_torch_saves_loads_equal_whatever_interrupts_it(error: int | None, memory: Path, tally: Tally) -> None:
    whole = CountingDisk()
    save_tensors(store_in(memory / "whole", whole), 20)
    for number in range(1, len(whole.done) + 1):
        folder = memory / str(number)
        save_tensors(store_in(folder), 10)
        disk = KilledAt(number) if error is None else FailingAt(number, error)
        with contextlib.suppress(Killed, SaveFailed):
            save_tensors(store_in(folder, disk), 20)
        with tally.state():
            chosen = store_in(folder).latest_valid().chosen
            assert chosen is not None
            loaded = torch.load(chosen.path, weights_only=True)
            expected = state(chosen.manifest.step)
            assert torch.equal(loaded["weights"], expected["weights"])
            assert torch.equal(loaded["moments"][0], expected["moments"][0])


def test_what_a_disk_said_is_told_not_what_a_serializer_made_of_it(memory: Path) -> None:
    store = store_in(memory, FailingAt(4, errno.ENOSPC, for_good=True))
    with pytest.raises(SaveFailed, match="No space left on device"):
        save_tensors(store, 10)


def test_a_serializer_that_swallows_an_error_commits_nothing(memory: Path) -> None:
    (memory / "checkpoints").mkdir(mode=0o700)
    for number in (2, 3):
        store = store_in(memory, FailingAt(number, errno.EIO))
        with store.stage("step=10.ckpt") as staged:
            file = staged.open()
            file.write(b"state")
            with contextlib.suppress(OSError):
                file.close()
            with pytest.raises(SaveFailed, match="Input/output error"):
                staged.commit(Facts(step=10))
        assert store.latest_valid().chosen is None
