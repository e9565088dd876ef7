"""Is this checkpoint whole? Quickly (manifest, names, sizes) or deeply (every byte)."""

from __future__ import annotations

import os
import stat
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from elastic_fit.supervisor.store.commit import manifest_path
from elastic_fit.supervisor.store.manifest import MAX_BYTES, FileEntry, Manifest, ManifestError

CHUNK_BYTES = 4 << 20
THREADS = 4

_known: dict[tuple[int, int, int, int], str] = {}
"""Digests that this process has computed, by device, inode, size and mtime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What verification found."""

    valid: bool
    why: str = ""
    """Why it isn't, in a line."""
    manifest: Manifest | None = None
    """Where it could be read."""


def verify(path: Path | str, *, deep: bool = True) -> Verdict:
    """Check one checkpoint against its manifest.

    Args:
        path: the checkpoint: a file or a folder of shards.
        deep: read every byte and compare digests; else only names, kinds and sizes.

    Never raises for what is wrong with the checkpoint; that is the verdict.
    """
    data = Path(path)
    try:
        manifest = read_manifest(data)
    except FileNotFoundError:
        return Verdict(valid=False, why="it has no manifest: never committed, or not written by elastic-fit")
    except (ManifestError, OSError) as error:
        return Verdict(valid=False, why=str(error))
    why = _shape(data, manifest)
    if why is None and deep:
        with ThreadPoolExecutor(THREADS) as threads:
            why = next((one for one in threads.map(lambda e: _digest(data, e), manifest.files) if one), None)
    if why is None and manifest.finite is False:
        return Verdict(valid=False, why="its parameters or optimizer state hold NaN or Inf", manifest=manifest)
    return Verdict(valid=why is None, why=why or "", manifest=manifest)


def read_manifest(data: Path) -> Manifest:
    """The manifest beside a checkpoint. Raises FileNotFoundError, OSError, ManifestError."""
    descriptor = os.open(manifest_path(data), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ManifestError("the manifest is not a plain file")
        if status.st_size > MAX_BYTES:
            raise ManifestError("the manifest is too large")
        return Manifest.parse(file.read(MAX_BYTES + 1))


def _shape(data: Path, manifest: Manifest) -> str | None:
    expected = {entry.path: entry for entry in manifest.files}
    try:
        mode = data.lstat().st_mode
    except OSError as error:
        return f"its data is missing: {error.strerror}"
    if stat.S_ISDIR(mode) != manifest.is_folder or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        return "its data is not of the kind that the manifest says"
    for entry in manifest.files:
        why = _file_shape(data / entry.path if entry.path else data, entry)
        if why:
            return why
    if manifest.is_folder:
        found = {str(Path(folder, name).relative_to(data)) for folder, _, names in os.walk(data) for name in names}
        strangers = sorted(found - set(expected))
        if strangers:
            return f"it holds a file that the manifest does not list: {strangers[0]}"
    return None


def _file_shape(path: Path, entry: FileEntry) -> str | None:
    name = entry.path or path.name
    try:
        status = path.lstat()
    except OSError as error:
        return f"{name} is missing: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is not a plain file"
    if status.st_size != entry.size:
        return f"{name} has {status.st_size} bytes, the manifest says {entry.size}"
    return None


def _digest(data: Path, entry: FileEntry) -> str | None:
    path = data / entry.path if entry.path else data
    name = entry.path or path.name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            digest = _known.get(key) or _known.setdefault(key, _read(file.fileno()))
    except OSError as error:
        return f"{name} can't be read: {error.strerror}"
    return None if digest == entry.digest else f"{name} is not what was written: its digest differs"


def _read(descriptor: int) -> str:
    """The digest of all that is to read. A thread hashes one buffer while another is being filled."""
    digest = xxhash.xxh3_128()
    filling, hashing = bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES)
    hashed: Future[None] | None = None
    with ThreadPoolExecutor(1) as hasher:
        while count := os.readv(descriptor, [filling]):
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, memoryview(filling)[:count])
            filling, hashing = hashing, filling
        if hashed is not None:
            hashed.result()
    return digest.hexdigest()
