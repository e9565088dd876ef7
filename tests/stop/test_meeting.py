"""Survivors meet over the shards of one checkpoint: late, at once, or over a disk that refuses something."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing as mp
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from elastic_fit.callbacks import replicas
from elastic_fit.callbacks.replicas import Replicas
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store import CheckpointStore, Disk, Facts, SaveFailed, verify
from elastic_fit.supervisor.store.parts import Meeting, Unfinished, unfinished
from tests.store.disks import CountingDisk, FailingAt, InterruptedAt, Killed, KilledAt

NAME, TOKEN = "step=5.ckpt", "0123abcd"
HOLDERS = ((0, 2, 4), (1, 3, 5))
FACTS = Facts(step=5, world_size=6, kind="emergency")


def save(rank: int, root: Path, disk: Disk | None = None, *, facts: Facts = FACTS) -> int | None:
    """What a survivor does. Each shard is one tensor."""
    mine = Replicas(rank=rank, holders=HOLDERS, token=TOKEN)
    state = {"state_dict": {f"tensor-{mine.shard}": torch.full((3,), float(mine.shard))}, "optimizer_states": []}
    return mine.save({**state, "epoch": 1}, CheckpointStore(root, disk=disk), f"step={facts.step}.ckpt", facts)


def assert_whole(root: Path, scratch: Path, name: str = NAME) -> None:
    """There is a valid checkpoint, and both shards are in it."""
    verdict = verify(root / name)
    assert verdict.valid, verdict.why
    dcp_to_torch_save(root / name, scratch)
    state = torch.load(scratch)["state_dict"]
    assert {key: value.tolist() for key, value in state.items()} == {"tensor-0": [0.0] * 3, "tensor-1": [1.0] * 3}


def hidden(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if name.startswith("."))


def test_whoever_comes_after_the_checkpoint_was_committed_leaves_nothing_behind(tmp_path: Path) -> None:
    root = tmp_path / "fit-1"
    assert save(0, root) is None
    assert save(1, root) is not None
    assert hidden(root) == []
    assert save(2, root) is None
    assert hidden(root) == []
    assert_whole(root, tmp_path / "whole.pt")


def each_on_its_own_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees the lock of another's folder, as may be on a network file system."""
    monkeypatch.setattr("elastic_fit.supervisor.store.parts.locked", lambda folder: contextlib.nullcontext())


def test_whoever_comes_while_the_shards_are_put_together_changes_nothing(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every operation of whoever does that, in turn, all others come."""
    each_on_its_own_host(monkeypatch)
    counting = CountingDisk()
    save(0, memory / "whole")
    save(1, memory / "whole", counting)
    for number in range(1, len(counting.done) + 1):
        root = memory / str(number)
        save(0, root)
        committed = []

        def meanwhile(root: Path = root, committed: list[bool] = committed) -> None:
            committed.extend(save(rank, root) is not None for rank in (2, 4, 3, 5))

        committed.append(save(1, root, InterruptedAt(number, meanwhile)) is not None)
        assert committed.count(True) == 1
        assert_whole(root, memory / "whole.pt")
        assert hidden(root) == []


def test_a_late_writer_on_another_host_writes_into_no_folder_that_anybody_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network file system it may have looked before all others, and go on to write when they are done."""
    root, write = tmp_path / "fit-1", replicas.write_part

    def write_late(*args: Any) -> Any:
        monkeypatch.undo()
        each_on_its_own_host(monkeypatch)
        save(0, root)
        assert save(1, root) is not None
        return write(*args)

    monkeypatch.setattr(replicas, "write_part", write_late)
    assert save(2, root) is None
    assert_whole(root, tmp_path / "whole.pt")
    assert hidden(root) == []


FAULTS: dict[str, Callable[[int], CountingDisk]] = {
    "an I/O error": lambda number: FailingAt(number, errno.EIO),
    "a full disk": lambda number: FailingAt(number, errno.ENOSPC),
    "no disk any more": lambda number: FailingAt(number, errno.EIO, for_good=True),
    "death": KilledAt,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ranks", [(0, 1), (0, 1, 2, 3), (1, 0, 0, 1)], ids=str)
def test_what_goes_wrong_at_any_operation_leaves_a_valid_checkpoint_or_tells_what_is_lost(
    fault: str, ranks: tuple[int, ...], memory: Path
) -> None:
    """It goes wrong for the first two, in turn: the one that leaves its shard, and the one that puts them together."""
    for victim in (0, 1):
        for number in itertools.count(1):
            root, disk = memory / f"{victim}-{number}", FAULTS[fault](number)
            told = survive(root, ranks, {victim: disk})
            if len(disk.done) < number:
                break
            where = f"at operation {number}: {disk.done[number - 1]}"
            CheckpointStore(root, generation=1).sweep()
            assert hidden(root) == [], where
            if verify(root / NAME).valid:
                assert_whole(root, memory / "whole.pt")
            else:
                assert told, where
                assert fault != "an I/O error", where
                assert not (root / NAME).exists(), where


def survive(root: Path, ranks: Iterable[int], disks: dict[int, CountingDisk]) -> list[str]:
    """Have survivors save, one after the other; returns what is told of step 5 if it is lost."""
    said = []
    for number, rank in enumerate(ranks):
        try:
            save(rank, root, disks.get(number))
        except (OSError, StorageError, RuntimeError) as error:
            said.append(str(error))
        except Killed:
            pass
    return [one.why for one in unfinished(root)] or said


def take_part(rank: int, root: Path, rounds: int, together: Barrier, committed: Any) -> None:
    torch.set_num_threads(1)
    for step in range(1, rounds + 1):
        together.wait()
        if save(rank, root, facts=replace(FACTS, step=step)) is not None:
            with committed.get_lock():
                committed[step] += 1


def test_of_those_who_find_all_shards_at_once_one_commits(memory: Path) -> None:
    context, rounds, ranks = mp.get_context("forkserver"), 50, (0, 1, 2, 3)
    context.set_forkserver_preload(["lightning.pytorch", "elastic_fit.callbacks.checkpoint"])
    together, committed = context.Barrier(len(ranks), timeout=120), context.Array("i", rounds + 1)
    root = memory / "fit-1"
    survivors = [context.Process(target=take_part, args=(rank, root, rounds, together, committed)) for rank in ranks]
    for one in survivors:
        one.start()
    for one in survivors:
        one.join()
    assert [one.exitcode for one in survivors] == [0] * len(ranks)
    assert list(committed) == [0, *[1] * rounds]
    assert hidden(root) == []
    for step in range(1, rounds + 1):
        assert verify(root / f"step={step}.ckpt").valid
    assert_whole(root, memory / "whole.pt", f"step={rounds}.ckpt")


def test_a_shard_that_is_not_what_its_record_says_is_not_committed(tmp_path: Path) -> None:
    save(0, tmp_path)
    (left,) = tmp_path.glob(".*.part-*")
    with next(left.glob("*.distcp")).open("ab") as file:
        file.write(b"more")
    with pytest.raises(StorageError, match="its record says"):
        save(1, tmp_path)
    assert not (tmp_path / NAME).exists()
    (told,) = unfinished(tmp_path)
    assert "all 2 shards of step 5 were saved" in told.why


def test_parts_are_found_by_who_sweeps_and_by_nobody_who_looks_for_checkpoints(tmp_path: Path) -> None:
    save(1, tmp_path)
    save(0, tmp_path, facts=replace(FACTS, step=6))
    assert CheckpointStore(tmp_path).scan() == []
    why = "of the 2 shards of step {} nobody has left shard {} (held by ranks {})"
    assert unfinished(tmp_path) == [
        Unfinished(step=6, why=why.format(6, 1, "1, 3 and 5")),
        Unfinished(step=5, why=why.format(5, 0, "0, 2 and 4")),
    ]
    assert CheckpointStore(tmp_path).sweep() == []
    assert len(CheckpointStore(tmp_path, generation=1).sweep()) == 2
    assert unfinished(tmp_path) == []


def test_a_claim_is_swept_once_its_holder_is_dead_whoever_the_others_are(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    holder = mp.get_context("fork").Process(target=claim_and_die, args=(tmp_path,))
    holder.start()
    holder.join()
    with Meeting(store, NAME, TOKEN).claimed() as is_mine:
        assert not is_mine
    assert store.leftovers() == store.sweep() == [f".{NAME}.claim-0-{TOKEN}"]
    with Meeting(store, NAME, TOKEN).claimed() as is_mine:
        assert is_mine
        assert store.sweep() == []
    assert hidden(tmp_path) == []


def claim_and_die(root: Path) -> None:
    with Meeting(CheckpointStore(root), NAME, TOKEN).claimed():
        os._exit(0)


RECORDS = ["", "[]", "1", "{}", '{"holders": 1, "files": []}']


@pytest.mark.parametrize("changed", [*RECORDS, {"step": "5"}, {"step": -1}, {"shard": 2}, {"holders": [[0], []]}])
def test_a_record_that_makes_no_sense_is_none(changed: str | dict[str, Any], tmp_path: Path) -> None:
    save(0, tmp_path)
    (record,) = tmp_path.glob(".*/part.json")
    text = changed if isinstance(changed, str) else json.dumps({**json.loads(record.read_text()), **changed})
    record.write_text(text)
    assert Meeting(CheckpointStore(tmp_path), NAME, TOKEN).parts() == {}
    assert unfinished(tmp_path) == []


def test_what_cannot_be_read_of_parts_does_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(0, tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda path: os.close(-1))
    assert unfinished(tmp_path) == []
    with pytest.raises(SaveFailed):
        save(1, tmp_path)
