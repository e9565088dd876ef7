"""Files read by several threads at once: the digest is that of their bytes in order, or there is none."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import xxhash

from elastic_fit.supervisor.store.digest import CHUNK_BYTES, LeftOff, digest_of


def written(path: Path, size: int) -> bytes:
    content = os.urandom(size)
    path.write_bytes(content)
    return content


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 4 * CHUNK_BYTES, 9 * CHUNK_BYTES + 5])
def test_however_many_read_a_file_its_digest_is_that_of_its_bytes(tmp_path: Path, size: int, lanes: int) -> None:
    content = written(tmp_path / "file", size)
    with (tmp_path / "file").open("rb") as file:
        assert digest_of(file.fileno(), lanes) == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("bad", range(9))
def test_a_piece_that_cannot_be_read_ends_all_readers_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, lanes: int
) -> None:
    written(tmp_path / "file", 8 * CHUNK_BYTES + 5)
    before = threading.active_count()

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, read=os.preadv) -> int:
        if offset == bad * CHUNK_BYTES:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Input/output"):
        digest_of(file.fileno(), lanes)
    assert threading.active_count() == before


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("pieces", [0, 1, 7])
def test_all_readers_leave_off_as_soon_as_they_are_told(tmp_path: Path, pieces: int, lanes: int) -> None:
    written(tmp_path / "file", 64 * CHUNK_BYTES)
    before = threading.active_count()
    asked: list[None] = []

    def is_told() -> bool:
        asked.append(None)
        return len(asked) > pieces

    with (tmp_path / "file").open("rb") as file, pytest.raises(LeftOff):
        digest_of(file.fileno(), lanes, is_told)
    assert threading.active_count() == before
    assert len(asked) <= pieces + lanes


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_a_file_that_grows_meanwhile_ends_where_its_end_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    content = written(tmp_path / "file", 6 * CHUNK_BYTES + 5)
    seen = threading.Event()

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, read=os.preadv) -> int:
        if offset > len(content):
            assert seen.wait(60)  # whoever reads beyond the end does so when there is more
        count = read(descriptor, buffers, offset)
        if offset == len(content) and count == 0:
            with (tmp_path / "file").open("ab") as file:
                file.write(b"x" * 9 * CHUNK_BYTES)
            seen.set()
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    with (tmp_path / "file").open("rb") as file:
        assert digest_of(file.fileno(), lanes) == xxhash.xxh3_128_hexdigest(content)


def test_a_file_system_that_gives_little_at_a_time_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = written(tmp_path / "file", 3 * CHUNK_BYTES + 5)

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, read=os.preadv) -> int:
        return read(descriptor, [buffers[0][:100_000]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with (tmp_path / "file").open("rb") as file:
        assert digest_of(file.fileno(), 2) == xxhash.xxh3_128_hexdigest(content)
