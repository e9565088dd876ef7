"""What a store tells of itself: free space, whom it trusts, what it remembers, its own example."""

from __future__ import annotations

import doctest
import os
import stat
from pathlib import Path

import pytest

from elastic_fit.supervisor import store as package
from elastic_fit.supervisor.store import CheckpointStore, Disk, Facts, SaveFailed, verify
from tests.store.stories import SHARDS, save, store_in


def test_the_example_in_the_documentation_runs() -> None:
    results = doctest.testmod(package)
    assert results.attempted >= 6
    assert results.failed == 0


class Nearly(Disk):
    """A disk with so many bytes free."""

    def __init__(self, free: int) -> None:
        self.free = free

    def free_bytes(self, path: Path) -> int | None:
        return self.free


def test_a_save_that_has_no_room_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    disk = Nearly(1 << 30)
    store = store_in(tmp_path, disk)
    save(store, 10)
    before = sorted(os.listdir(store.root))
    disk.free = 8000
    with pytest.raises(SaveFailed, match="the last save took 9000 bytes, and 8000 are free") as refusal:
        store.stage("step=20.ckpt")
    assert "free some space" in refusal.value.hint
    assert sorted(os.listdir(store.root)) == before


def test_another_process_knows_the_size_of_the_last_save_from_its_manifest(tmp_path: Path) -> None:
    save(store_in(tmp_path), 10, shards=SHARDS)
    with pytest.raises(SaveFailed, match="the last save took 18000 bytes"):
        store_in(tmp_path, Nearly(17999)).stage("step=20.ckpt")
    store_in(tmp_path, Nearly(18000)).stage("step=20.ckpt")


def test_what_this_process_wrote_or_read_is_known_until_it_is_touched(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10, shards=SHARDS)
    path = store.root / "step=10.ckpt"
    assert verify(path).depth == "known"
    shard = path / SHARDS[0]
    status = shard.stat()
    shard.write_bytes(shard.read_bytes())
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verify(path).depth == "deep", "nobody can set a file's ctime back"
    assert verify(path).depth == "known"
    assert verify(path, deep=False).depth == "quick"


def test_files_are_for_their_owner_alone_and_folders_are_not_open_to_all(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = store_in(tmp_path / "new" / "run")
        save(store, 10, shards=SHARDS)
        save(store, 20)
    finally:
        os.umask(before)
    for path in (tmp_path / "new").rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_what_holds_nan_is_kept_for_inspection_and_never_selected(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    with store.stage("step=20.ckpt") as staged:
        with staged.open() as file:
            file.write(b"nan")
        staged.commit(Facts(step=20, finite=False))
    selection = store.latest_valid()
    assert selection.chosen is not None
    assert selection.chosen.manifest.step == 10
    assert [one.why for one in selection.rejected] == ["its parameters or optimizer state hold NaN or Inf"]
    assert (store.root / "step=20.ckpt").exists()


def test_last_ckpt_that_was_a_checkpoint_of_its_own_becomes_a_link(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10, "last.ckpt", shards=SHARDS)
    save(store, 20)
    store.link_last("step=20.ckpt")
    assert os.readlink(store.root / "last.ckpt") == "step=20.ckpt"
    assert [path.name for path in store.candidates()] == ["step=20.ckpt"]


def test_two_saves_of_one_name_at_a_time_end_with_one_that_is_whole(tmp_path: Path) -> None:
    """Without a launcher, nothing keeps two trainings out of one folder; they don't tear each other's saves, though."""
    first, second = store_in(tmp_path), CheckpointStore(tmp_path / "checkpoints")
    with first.stage("last.ckpt") as staged:
        with staged.open() as file:
            file.write(b"one")
        save(second, 20, "last.ckpt")
        staged.commit(Facts(step=10))
    assert [one.manifest.step for one in first.committed()] == [10]
    assert verify(first.root / "last.ckpt").valid
