"""Damage of every kind, at every place: detected, and the checkpoint before it is the one that is selected."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_fit.supervisor.store import CheckpointStore, Manifest, ManifestError, verify
from tests.store.stories import SHARDS, content, is_intact, save, store_in

PAGE = 4096


@pytest.fixture(params=[(), SHARDS], ids=["file", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    """Steps 10 and 20."""
    store = store_in(tmp_path)
    for step in (10, 20):
        save(store, step, shards=request.param)
    return store


def newest(store: CheckpointStore) -> Path:
    return store.root / "step=20.ckpt"


def manifest_of(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def must_be_noticed(store: CheckpointStore) -> str:
    """The newest is rejected, and the one before it selected, whole; returns why."""
    selection = store.latest_valid()
    assert selection.chosen is not None
    assert selection.chosen.manifest.step == 10
    assert is_intact(selection.chosen)
    assert [one.path for one in selection.rejected] == [newest(store)]
    return selection.rejected[0].why


def with_bytes(path: Path, change: Callable[[bytearray], bytes], check: Callable[[], object]) -> None:
    """Change a file, check, and change it back."""
    whole = path.read_bytes()
    path.write_bytes(change(bytearray(whole)))
    check()
    path.write_bytes(whole)


def flipped(at: int, bit: int) -> Callable[[bytearray], bytes]:
    def flip(data: bytearray) -> bytes:
        data[at] ^= 1 << bit
        return bytes(data)

    return flip


def test_a_flipped_bit_in_any_page_is_noticed(store: CheckpointStore) -> None:
    for file in files_of(newest(store)):
        for page in range(0, file.stat().st_size, PAGE):
            for at in (page, min(page + PAGE, file.stat().st_size) - 1):
                with_bytes(file, flipped(at, page // PAGE % 8), lambda: must_be_noticed(store))
    assert verify(newest(store)).valid


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_noticed(store: CheckpointStore) -> None:
    file = manifest_of(newest(store))
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            with pytest.raises(ManifestError):
                Manifest.parse(flipped(at, bit)(bytearray(whole)))
        if at % 10 == 0:
            with_bytes(file, flipped(at, at % 8), lambda: must_be_noticed(store))
    assert verify(newest(store)).valid


@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, -PAGE, -1], ids=str)
def test_a_file_cut_at_any_length_is_noticed(store: CheckpointStore, length: int) -> None:
    for file in files_of(newest(store)):
        with_bytes(file, lambda data: bytes(data[:length]), lambda: must_be_noticed(store))


def test_a_manifest_cut_anywhere_is_noticed(store: CheckpointStore) -> None:
    file = manifest_of(newest(store))
    for length in range(0, file.stat().st_size, 7):
        with_bytes(file, lambda data, length=length: bytes(data[:length]), lambda: must_be_noticed(store))


def test_a_page_of_zeros_and_bytes_at_the_end_are_noticed(store: CheckpointStore) -> None:
    for file in files_of(newest(store)):
        with_bytes(
            file,
            lambda data: bytes(data[:PAGE]) + bytes(PAGE) + bytes(data[2 * PAGE :]),
            lambda: must_be_noticed(store),
        )
        with_bytes(file, lambda data: bytes(data) + b"\0", lambda: must_be_noticed(store))


def test_a_missing_manifest_is_noticed(store: CheckpointStore) -> None:
    manifest_of(newest(store)).unlink()
    assert "no manifest" in must_be_noticed(store)


def test_missing_data_is_noticed(store: CheckpointStore) -> None:
    path = newest(store)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "missing" in must_be_noticed(store)


def test_a_manifest_copied_from_another_step_is_noticed(store: CheckpointStore) -> None:
    shutil.copy(manifest_of(store.root / "step=10.ckpt"), manifest_of(newest(store)))
    assert must_be_noticed(store) == "its manifest is that of step=10.ckpt"


def test_a_manifest_copied_between_checkpoints_with_equal_bytes_is_noticed(tmp_path: Path) -> None:
    """A training with a learning rate of zero: the digests are right, and the step would be a lie."""
    store = store_in(tmp_path)
    save(store, 10)
    save(store, 20)
    (store.root / "step=20.ckpt").write_bytes(b"".join(content(10)))
    shutil.copy(manifest_of(store.root / "step=10.ckpt"), manifest_of(newest(store)))
    assert "that of step=10.ckpt" in must_be_noticed(store)


def test_a_checkpoint_whose_kind_is_another_is_noticed(store: CheckpointStore) -> None:
    path = newest(store)
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"".join(content(20, SHARDS[0])))
    else:
        path.unlink()
        path.mkdir()
    assert "kind" in must_be_noticed(store)


@pytest.fixture
def sharded(tmp_path: Path) -> CheckpointStore:
    store = store_in(tmp_path)
    for step in (10, 20):
        save(store, step, shards=SHARDS)
    return store


def test_a_missing_shard_is_noticed(sharded: CheckpointStore) -> None:
    (newest(sharded) / SHARDS[1]).unlink()
    assert must_be_noticed(sharded) == f"{SHARDS[1]} is missing"


def test_shards_of_two_generations_are_noticed(sharded: CheckpointStore) -> None:
    """Of the same size and name, as an overwrite in place that was interrupted leaves them."""
    shutil.copy(sharded.root / "step=10.ckpt" / SHARDS[1], newest(sharded) / SHARDS[1])
    assert "digest differs" in must_be_noticed(sharded)


def test_two_shards_that_changed_places_are_noticed(sharded: CheckpointStore) -> None:
    first, second = (newest(sharded) / shard for shard in SHARDS)
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)
    assert "digest differs" in must_be_noticed(sharded)


def test_a_shard_too_many_is_noticed(sharded: CheckpointStore) -> None:
    (newest(sharded) / "__2_0.distcp").write_bytes(b"of a larger world")
    assert "does not list" in must_be_noticed(sharded)


def test_damage_that_only_the_digest_shows_and_mtime_hides_is_noticed(store: CheckpointStore) -> None:
    """This process has written the file, and knows its digest; the file has changed all the same."""
    file = files_of(newest(store))[0]
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "digest differs" in must_be_noticed(store)


def test_when_nothing_is_whole_nothing_is_selected_and_each_is_named(store: CheckpointStore) -> None:
    for step in (10, 20):
        with manifest_of(store.root / f"step={step}.ckpt").open("ab") as file:
            file.write(b" ")
    selection = store.latest_valid()
    assert selection.chosen is None
    assert {one.path.name for one in selection.rejected} == {"step=10.ckpt", "step=20.ckpt"}
