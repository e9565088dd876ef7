"""Is this checkpoint whole? Quickly (manifest, names, sizes) or deeply (every byte)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from elastic_fit.supervisor.store.digest import LANES, digest_of, never
from elastic_fit.supervisor.store.manifest import MAX_BYTES, FileEntry, Manifest, ManifestError, manifest_path
from elastic_fit.supervisor.store.objects import Url, is_remote, local_path
from elastic_fit.supervisor.store.trust import UntrustedFile, distrust, open_below, read_small, walk

THREADS = 4
"""Files that are read at a time, or more where there are more cores: also while one waits for its disk."""

Identity = tuple[int, int, int, int, int]

_known: dict[Identity, str] = {}
"""Digests that this process has computed, reading or writing, by device, inode, size, mtime and ctime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What verification found."""

    valid: bool
    why: str = ""
    """Why it isn't, in a line."""
    manifest: Manifest | None = None
    """Where it could be read."""
    is_sealed: bool = True
    """Whether there is a manifest at all, be it a torn one."""
    depth: str = "quick"
    """How closely it was looked at: ``quick`` (names and sizes), ``deep`` (every byte was read), or ``known`` (this
    process has read or written every byte before, and the files are unchanged)."""


def verify(path: Path | Url | str, *, deep: bool = True, is_told: Callable[[], bool] = never) -> Verdict:
    """Check one checkpoint against its manifest.

    Args:
        path: the checkpoint: a file, a folder of shards, or the URL of an object.
        deep: compare the digest of every byte; else only names, kinds and sizes.
        is_told: asked again and again, by any thread, whether to leave off.

    Never raises for what is wrong with the checkpoint; that is the verdict. Raises LeftOff where it was told so.
    """
    if is_remote(path):
        from elastic_fit.supervisor.store.remote import verify_object

        return verify_object(Url(str(path)), deep=deep, is_told=is_told)
    data = Path(os.path.abspath(local_path(path)))
    if not data.name:
        return Verdict(valid=False, why="it is no checkpoint")
    try:
        manifest = read_manifest(data)
    except FileNotFoundError:
        return unsealed()
    except ManifestError as error:
        return Verdict(valid=False, why=error.message)
    except OSError as error:
        return Verdict(valid=False, why=f"its manifest can't be read: {error.strerror}")
    if not manifest.belongs_to(data.name):
        return Verdict(valid=False, why=f"its manifest is that of {manifest.name}", manifest=manifest)
    try:
        why, depth = check(data, manifest, deep=deep, is_told=is_told)
    except OSError as error:
        return Verdict(valid=False, why=f"{error.filename} can't be read: {error.strerror}", manifest=manifest)
    return judged(manifest, why, depth)


def unsealed() -> Verdict:
    """The verdict on what has no manifest."""
    why = "it has no manifest: never committed, or not written by elastic-fit"
    return Verdict(valid=False, why=why, is_sealed=False)


def judged(manifest: Manifest, why: str | None, depth: str) -> Verdict:
    """The verdict on a checkpoint with that manifest, given what is wrong with its data."""
    if why is None and manifest.finite is False:
        why = "its parameters or optimizer state hold NaN or Inf"
    return Verdict(valid=why is None, why=why or "", manifest=manifest, depth=depth)


def check(
    data: Path, manifest: Manifest, *, deep: bool = True, is_told: Callable[[], bool] = never
) -> tuple[str | None, str]:
    """Compare data with a manifest, whatever their names: why they don't agree (or None), and the depth.

    Raises OSError where that can't be told, LeftOff where `is_told` says so.
    """
    why = _shape(data, manifest)
    if why is not None or not deep:
        return why, "quick"
    cores, count = len(os.sched_getaffinity(0)), len(manifest.files)
    compare = partial(_compare, data, lanes=min(LANES, cores // count), is_told=is_told)
    with ThreadPoolExecutor(min(count, max(THREADS, cores))) as threads:
        results = threads.map(compare, manifest.files)
        known = True
        for why, was_known in results:
            known = known and was_known
            if why is not None:
                return why, "deep"
    return None, "known" if known else "deep"


def read_manifest(data: Path) -> Manifest:
    """The manifest beside a checkpoint. Raises FileNotFoundError, OSError, ManifestError."""
    try:
        # Its second name, while its checkpoint is being set aside, does no harm: it is digested as it is read.
        return Manifest.parse(read_small(manifest_path(data), "", MAX_BYTES, may_have_links=True))
    except UntrustedFile as error:
        raise ManifestError(f"the manifest {error.why}") from error


def identify(status: os.stat_result) -> Identity:
    """What a file is known by. Nobody can set its ctime."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def remember(status: os.stat_result, digest: str) -> None:
    """This process has written a file with that digest, and it is unchanged."""
    _known[identify(status)] = digest


def _shape(data: Path, manifest: Manifest) -> str | None:
    try:
        status = data.lstat()
        if stat.S_ISDIR(status.st_mode) != manifest.is_folder:
            return "its data is not of the kind that the manifest says"
        if manifest.is_folder and (why := distrust(status)):
            return f"its folder {why}"
        found = dict(walk(data)) if manifest.is_folder else {"": status}
    except FileNotFoundError:
        return "its data is missing"
    for entry in manifest.files:
        if why := _file_shape(entry.path or data.name, found.pop(entry.path, None), entry):
            return why
    if found:
        return f"it holds a file that the manifest does not list: {min(found)}"
    return None


def _file_shape(name: str, status: os.stat_result | None, entry: FileEntry) -> str | None:
    if status is None:
        return f"{name} is missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is not a plain file"
    if status.st_size != entry.size:
        return f"{name} has {status.st_size} bytes, the manifest says {entry.size}"
    if why := distrust(status):
        return f"{name} {why}"
    return None


def _compare(data: Path, entry: FileEntry, *, lanes: int, is_told: Callable[[], bool]) -> tuple[str | None, bool]:
    """Why a file isn't what was written, and whether its digest was known. Reads with up to `lanes` threads."""
    name = entry.path or data.name
    try:
        with open(open_below(data, entry.path), "rb", buffering=0) as file:
            key = identify(os.fstat(file.fileno()))
            known = _known.get(key)
            digest = known or _known.setdefault(key, digest_of(file.fileno(), lanes, is_told))
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from error
    same = digest == entry.digest
    return None if same else f"{name} is not what was written: its digest differs", known is not None
