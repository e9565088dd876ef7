"""Survivors meet over the shards of one checkpoint: late, at once, or over a disk that refuses something."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing as mp
import os
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from elastic_fit import ElasticCheckpoint
from elastic_fit.callbacks import replicas
from elastic_fit.callbacks.replicas import Replicas
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store import CheckpointStore, Disk, Facts, SaveFailed, verify
from elastic_fit.supervisor.store.manifest import MAX_BYTES
from elastic_fit.supervisor.store.parts import Meeting, Unfinished, unfinished
from tests.agent.harness import wait_until
from tests.checkpoint.models import Line, trainer
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
    monkeypatch.setattr("elastic_fit.supervisor.store.parts.locked", lambda folder: contextlib.nullcontext(False))


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


class DiesOverTheCommit(CountingDisk):
    """Its process does not leave its shard before another one has, and dies with all shards in its hands."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.is_at_it = threading.Event()

    def before(self, number: int, operation: str) -> None:
        if operation == "rename":
            self.is_at_it.set()
            wait_until(lambda: list(self.root.glob(".*.part-*")))
        if operation == "link":
            raise Killed


def test_whoever_has_left_its_shard_waits_for_one_that_is_at_it_and_stands_in_for_it(memory: Path) -> None:
    root = memory / "fit-1"
    disk = DiesOverTheCommit(root)
    with ThreadPoolExecutor() as threads:
        dying = threads.submit(save, 0, root, disk)
        assert disk.is_at_it.wait(20)
        assert save(1, root) is not None
        assert isinstance(dying.exception(), Killed | None)
    assert_whole(root, memory / "whole.pt")
    assert hidden(root) == []


class NoFileInTwoFolders(Disk):
    """As some network file systems are."""

    def link(self, source: Path, target: Path) -> None:
        if source.parent != target.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        super().link(source, target)


def test_where_no_file_can_be_in_two_folders_the_shards_are_copied(memory: Path) -> None:
    root = memory / "fit-1"
    save(0, root)
    (written,) = root.glob(".*.part-*/*.distcp")
    good = written.read_bytes()
    written.write_bytes(good[:-1] + b"?")
    with pytest.raises(StorageError, match="is not what its record says"):
        save(1, root, NoFileInTwoFolders())
    written.write_bytes(good)
    assert save(1, root, NoFileInTwoFolders()) is not None
    assert_whole(root, memory / "whole.pt")
    assert hidden(root) == []


def test_a_checkpoint_whose_shards_were_not_cleared_away_is_whole_once_they_are_swept(memory: Path) -> None:
    counting = CountingDisk()
    save(0, memory / "counted")
    save(1, memory / "counted", counting)
    committed = len(counting.done) - counting.done[::-1].index("rename")
    root = memory / "fit-1"
    save(0, root)
    with pytest.raises(Killed):
        save(1, root, KilledAt(committed + 1))
    assert unfinished(root)
    CheckpointStore(root, generation=1).sweep()
    assert_whole(root, memory / "whole.pt")
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
                assert len(ranks) == 2, f"{where}: nobody has come whom the disk would have taken the shards of"
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


def test_without_a_launcher_it_is_told_as_well_what_never_came_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "checkpoints"
    save(1, root)
    (left,) = root.glob(".*")
    left.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")))
    trainer(tmp_path, ElasticCheckpoint(dirpath=root, resume="auto"), max_epochs=1).fit(Line())
    why = "of the 2 shards of step 5 nobody has left shard 0 (held by ranks 0, 2 and 4)"
    assert f"5 steps since step 0 are lost: {why}" in caplog.text
    assert hidden(root) == []


def test_a_claim_whose_holder_is_dead_is_taken_over_on_its_host_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    holder = mp.get_context("fork").Process(target=claim_and_die, args=(tmp_path,))
    holder.start()
    holder.join()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("elastic_fit.supervisor.store.disk._host", lambda: "0a0b0c0d")
        with Meeting(store, NAME, TOKEN).claimed() as is_mine:
            assert not is_mine
        assert store.leftovers() == []
    assert store.leftovers() == [f".{NAME}.claim-0-{TOKEN}"]
    with Meeting(store, NAME, TOKEN).claimed() as is_mine:
        assert is_mine
        assert store.sweep() == []
    assert hidden(tmp_path) == []


def test_a_claim_is_swept_once_its_holder_is_dead_whoever_the_others_are(tmp_path: Path) -> None:
    holder = mp.get_context("fork").Process(target=claim_and_die, args=(tmp_path,))
    holder.start()
    holder.join()
    assert CheckpointStore(tmp_path).sweep() == [f".{NAME}.claim-0-{TOKEN}"]
    assert hidden(tmp_path) == []


def claim_and_die(root: Path) -> None:
    with Meeting(CheckpointStore(root), NAME, TOKEN).claimed():
        os._exit(0)


RECORDS = ["", "[]", "1", "{}", '{"holders": 1, "files": []}', "[" * 200_000, "\xff"]


@pytest.mark.parametrize("changed", [*RECORDS, {"step": "5"}, {"step": -1}, {"shard": 2}, {"holders": [[0], []]}])
def test_a_record_that_makes_no_sense_is_none(changed: str | dict[str, Any], tmp_path: Path) -> None:
    save(0, tmp_path)
    (record,) = tmp_path.glob(".*/part.json")
    text = changed if isinstance(changed, str) else json.dumps({**json.loads(record.read_text()), **changed})
    record.write_text(text, encoding="latin-1")
    assert Meeting(CheckpointStore(tmp_path), NAME, TOKEN).parts() == {}
    assert unfinished(tmp_path) == []


def a_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(path.name)


def too_large(path: Path) -> None:
    path.write_text((path.parent / "good").read_text() + " " * MAX_BYTES)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "a socket": a_socket,
    "a link": lambda path: path.symlink_to("good"),
    "a second name": lambda path: os.link("good", path),
    "too large": too_large,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_record_that_nobody_of_ours_has_written_is_none_and_is_not_waited_for(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others have left is told all the same."""
    save(1, tmp_path, facts=replace(FACTS, step=6))
    save(0, tmp_path)
    (record,) = tmp_path.glob(".step=5*/part.json")
    monkeypatch.chdir(record.parent)  # the name of a socket must be short
    record.rename("good")
    HOSTILE[what](record)
    assert Meeting(CheckpointStore(tmp_path), NAME, TOKEN).parts() == {}
    assert [one.step for one in unfinished(tmp_path)] == [6]


def test_what_cannot_be_read_of_parts_does_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(0, tmp_path)
    monkeypatch.setattr("elastic_fit.supervisor.store.parts.read_small", lambda *_: os.close(-1))
    assert unfinished(tmp_path) == []
    with pytest.raises(SaveFailed):
        save(1, tmp_path)
