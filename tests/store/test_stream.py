"""Bytes on their way to disk: digested as they pass, in bounded memory, and never acknowledged after a failure."""

from __future__ import annotations

import contextlib
import errno
import io
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import xxhash
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

from elastic_fit.callbacks.seal import is_finite, persist
from elastic_fit.supervisor.store import CheckpointStore, Disk, Facts, SaveFailed, latest_valid, verify
from elastic_fit.supervisor.store.stream import CHUNK_BYTES, WAITING


class Refusing(Disk):
    """A disk that is full after so many bytes, and counts what is asked of it."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.syncs = 0

    def write(self, descriptor: int, data: memoryview) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self.syncs += 1
        super().sync(descriptor)


@pytest.mark.parametrize(
    "sizes", [(0,), (1, 2, 3), (CHUNK_BYTES,), (5, CHUNK_BYTES - 5), (3 * CHUNK_BYTES + 1, 7), (CHUNK_BYTES + 1,) * 6]
)
def test_pieces_of_every_size_arrive_in_order_and_as_digested(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    pieces = [torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes() for size in sizes]
    store = CheckpointStore(tmp_path)
    with store.stage("a.ckpt") as staged:
        with staged.open() as file:
            for piece in pieces:
                assert file.write(piece) == len(piece)
            assert file.tell() == sum(sizes)
        checkpoint = staged.commit(Facts(step=1))
    assert (tmp_path / "a.ckpt").read_bytes() == b"".join(pieces)
    assert checkpoint.manifest.files[0].digest == xxhash.xxh3_128_hexdigest(b"".join(pieces))


def test_a_buffer_that_its_owner_uses_again_is_stored_as_it_was(tmp_path: Path) -> None:
    buffer = bytearray(b"a" * (CHUNK_BYTES + 3))
    with CheckpointStore(tmp_path).stage("a.ckpt") as staged:
        with staged.open() as file:
            file.write(buffer)
            buffer[:] = b"b" * len(buffer)
            file.write(buffer)
        staged.commit(Facts(step=1))
    assert (tmp_path / "a.ckpt").read_bytes() == b"a" * len(buffer) + b"b" * len(buffer)


@pytest.mark.parametrize("room", [0, 5, CHUNK_BYTES, 3 * CHUNK_BYTES, 9 * CHUNK_BYTES])
def test_a_disk_that_fills_up_behind_the_writers_back_is_told_and_nothing_is_left(tmp_path: Path, room: int) -> None:
    disk = Refusing(room)
    state = {"a": torch.zeros(10 * CHUNK_BYTES, dtype=torch.uint8)}
    with pytest.raises(SaveFailed, match="No space left"):
        persist(state, CheckpointStore(tmp_path, disk=disk), "a.ckpt", Facts(step=1))
    assert list(tmp_path.iterdir()) == []
    assert disk.syncs == 0


def test_what_comes_after_the_end_is_refused_not_lost(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path).stage("a.ckpt") as staged:
        with staged.open() as file:
            file.write(b"x" * (CHUNK_BYTES + 1))
        with pytest.raises(ValueError, match="closed"):
            file.write(b"more")
        staged.commit(Facts(step=1))
    assert verify(tmp_path / "a.ckpt").valid


def test_an_error_in_the_middle_of_a_shard_commits_nothing(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path).stage("a.ckpt") as staged:
        staged.mkdir()
        with contextlib.suppress(RuntimeError), staged.open_part("0.distcp") as file:
            file.write(b"x" * (2 * CHUNK_BYTES))
            raise RuntimeError("the rank fell over, and its caller did not care")
        with pytest.raises(SaveFailed, match="broken off"):
            staged.commit(Facts(step=1))
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_holds_the_writer_back_instead_of_filling_the_memory(tmp_path: Path) -> None:
    pending: list[int] = []

    class Slow(Disk):
        def write(self, descriptor: int, data: memoryview) -> int:
            pending.append(file.tell() - sum(written))
            written.append(len(data))
            return super().write(descriptor, data)

    written: list[int] = []
    with CheckpointStore(tmp_path, disk=Slow()).stage("a.ckpt") as staged:
        with staged.open() as file:
            for _ in range(20):
                file.write(bytes(CHUNK_BYTES))
        staged.commit(Facts(step=1))
    assert max(pending) <= (WAITING + 2) * CHUNK_BYTES


def test_what_torch_saves_through_it_is_what_torch_saves(tmp_path: Path) -> None:
    state = {"large": torch.randn(3 << 20), "small": [torch.randn(7) for _ in range(500)], "text": "x"}
    persist(state, CheckpointStore(tmp_path), "a.ckpt", Facts(step=1))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert (tmp_path / "a.ckpt").read_bytes() == buffer.getvalue()
    assert latest_valid(tmp_path).chosen is not None


def test_deep_verification_finds_one_flipped_bit_in_any_buffer(tmp_path: Path) -> None:
    persist({"a": torch.zeros(5 << 20)}, CheckpointStore(tmp_path), "a.ckpt", Facts(step=1))
    path = tmp_path / "a.ckpt"
    for position in range(1000, path.stat().st_size, 3 << 20):
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))
            file.flush()
            assert "digest differs" in verify(path).why
            file.seek(position)
            file.write(bytes([byte]))
    assert verify(path).valid


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    state = {
        "state_dict": {"a": torch.ones(1000).to(dtype)},
        "optimizer_states": [{"state": {0: {"m": torch.ones(3)}}}],
    }
    assert is_finite(state)
    wide = torch.ones(1000)
    wide[617] = bad
    state["state_dict"]["b"] = wide.to(dtype)
    assert not is_finite(state)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64, torch.complex32])
@pytest.mark.parametrize("bad", [complex(float("nan"), 1), complex(1, float("nan")), complex(1, float("inf"))])
def test_one_bad_complex_number_is_found(dtype: torch.dtype, bad: complex) -> None:
    good = torch.ones(3, dtype=torch.complex64)
    assert is_finite({"state_dict": {"a": good.to(dtype), "b": good.conj()}})
    assert not is_finite({"state_dict": {"a": torch.tensor([1, bad]).to(dtype), "b": torch.ones(3)}})
    assert not is_finite({"optimizer_states": [{"state": {0: {"m": torch.tensor(bad).conj()}}}]})


def test_large_numbers_whose_sum_overflows_are_finite() -> None:
    largest = torch.finfo(torch.float32).max
    assert is_finite({"state_dict": {"a": torch.full((8,), largest), "b": torch.full((8,), 60000.0).half()}})
    assert not is_finite({"state_dict": {"a": torch.tensor([float("inf"), float("-inf")])}})
    assert is_finite({"state_dict": {}})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_shards_of_fsdp_are_looked_into(bad: float) -> None:
    """Its sharded state without a device mesh is made of ShardedTensor, which knows next to no operation."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        place = ShardMetadata(shard_offsets=[0], shard_sizes=[3], placement="rank:0/cpu")
        good, spoilt = (
            init_from_local_shards([Shard(torch.tensor([1.0, 2.0, last]), place)], 3) for last in (3.0, bad)
        )
        assert is_finite({"state_dict": {"a": good}})
        assert not is_finite({"state_dict": {"a": good, "b": spoilt}})
    finally:
        dist.destroy_process_group()
