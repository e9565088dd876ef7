"""The manifest: what a checkpoint consists of, and who wrote it when. Parsed with limits, trusted for nothing else."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from elastic_fit.supervisor.errors import StorageError

SCHEMA_VERSION = 1
SUFFIX = ".manifest.json"
MAX_BYTES = 16 << 20
MAX_FILES = 200_000
MAX_THINGS = 1 << 20
"""Values in a manifest, of whatever kind: each takes a hundred times the memory of its one or two letters of text."""
MAX_NAME = 1024
MAX_DEPTH = 32
"""How deep the JSON of a manifest may be nested."""

_ASIDE = ".replaced-"


class ManifestError(StorageError):
    """A manifest is not one: torn, hostile, or of another schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    path: str
    """Relative to the checkpoint, with ``/``; the empty string is the checkpoint itself, when it is a file."""
    size: int
    """Bytes."""
    digest: str
    """xxh3-128, 32 hex digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the writer knows about a checkpoint."""

    step: int
    """Optimizer steps completed."""
    epoch: int = 0
    samples: int | None = None
    """Samples of the epoch that have been consumed, over all ranks, where known: of the first training loader."""
    world_size: int = 1
    strategy: str = ""
    kind: str = "periodic"
    """``periodic``, ``time``, ``epoch``, ``final``, ``stop``, ``emergency``, ``manual``, ..."""
    reason: str = ""
    run_id: str = ""
    generation: int = 0
    """Fencing number of the supervisor that wrote it."""
    branch: int = 0
    """Which line of history it is of: a training that begins behind what its folder holds begins the next one."""
    finite: bool | None = None
    """False where parameters or optimizer state hold NaN or Inf: kept, never resumed from. None where unknown."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """JSON, for what others need to know, such as ``finished``."""

    def __post_init__(self) -> None:
        if min(self.step, self.generation, self.branch) < 0 or self.world_size < 1:
            raise ValueError("step, generation and branch must be >= 0 and world_size >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Facts):
    """The facts, and every file with its size and digest."""

    files: tuple[FileEntry, ...]
    name: str = ""
    """The checkpoint's name in its folder: beside data of another name, this manifest is none. Empty: any name."""
    is_folder: bool = False
    created: float = field(default_factory=time.time)
    """Seconds since the epoch, on the writer's clock; for people only, never for order."""
    schema_version: int = SCHEMA_VERSION

    @property
    def order(self) -> tuple[int, int, int, bool]:
        """What checkpoints are ordered by; of two at the same point, the one that says the fit has ended is newer."""
        return self.branch, self.step, self.generation, bool(self.extra.get("finished"))

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.size for entry in self.files)

    def belongs_to(self, file_name: str) -> bool:
        """Whether it was written for a checkpoint of that name, which may have been set aside since."""
        aside = split_aside(file_name)
        return self.name in ("", file_name) or (aside is not None and self.name == aside[0])

    def to_bytes(self) -> bytes:
        """The text that is stored; its ``seal`` is the digest of all the rest.

        Raises ManifestError where nobody would read it again, as it is too large.
        """
        data = _sealed(asdict(self))
        _check_size(data)
        return data

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """From its text. Raises ManifestError for anything that isn't exactly a manifest."""
        _check_size(data)
        try:
            record = json.loads(data)
            if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
                raise ManifestError("not a manifest of a schema that this version knows")
            _check_depth(record, MAX_DEPTH)
            record.pop("seal", None)
            if _sealed(record) != data:
                raise ManifestError("the manifest is not what was written: its own digest differs")
            return _build(record)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ManifestError(f"the manifest can't be read: {type(error).__name__}: {error}") from error


def manifest_path(data: Path) -> Path:
    """Where the manifest of that checkpoint is."""
    return data.with_name(data.name + SUFFIX)


def aside_name(name: str, token: str) -> str:
    """The name under which a checkpoint stays valid while another one takes its own."""
    return f"{name.removesuffix('.ckpt')}{_ASIDE}{token}.ckpt"


def split_aside(name: str) -> tuple[str, str] | None:
    """The name that a checkpoint had before it was set aside, and the token; None where it wasn't."""
    found = re.fullmatch(rf"(.+){re.escape(_ASIDE)}([0-9a-z-]+)\.ckpt", name, re.DOTALL)
    return (f"{found[1]}.ckpt", found[2]) if found else None


def _sealed(record: dict[str, Any]) -> bytes:
    # No byte may change without being noticed, so spelling counts as well: there is one text for each manifest.
    body = json.dumps({key: value for key, value in record.items() if key != "seal"}, sort_keys=True).encode()
    seal = xxhash.xxh3_128_hexdigest(body)
    return (json.dumps({**record, "seal": seal}, indent=1, sort_keys=True) + "\n").encode()


def _check_size(data: bytes) -> None:
    if len(data) > MAX_BYTES:
        raise ManifestError(f"the manifest is larger than {MAX_BYTES} bytes")
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_THINGS:
        raise ManifestError(f"the manifest holds more than {MAX_THINGS} things")


def _check_depth(thing: object, limit: int) -> None:
    if limit == 0:
        raise ManifestError(f"the manifest is nested deeper than {MAX_DEPTH}")
    if isinstance(thing, (dict, list)):
        for one in thing.values() if isinstance(thing, dict) else thing:
            _check_depth(one, limit - 1)


def _build(record: dict[str, Any]) -> Manifest:
    entries = record["files"]
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_FILES:
        raise ManifestError(f"the manifest must list between 1 and {MAX_FILES} files")
    files = tuple(FileEntry(path=one["path"], size=one["size"], digest=one["digest"]) for one in entries)
    for entry in files:
        check_entry(entry)
    if len({entry.path for entry in files}) != len(files):
        raise ManifestError("the manifest lists a file twice")
    known = {name: record[name] for name in Manifest.__dataclass_fields__ if name in record}
    for name, kind in (("step", int), ("epoch", int), ("generation", int), ("world_size", int), ("kind", str)):
        if type(known[name]) is not kind:
            raise ManifestError(f"{name} must be {kind.__name__}")
    if known.get("finite") not in (None, True, False):
        raise ManifestError("finite must be true, false or null")
    for name in ("metrics", "versions", "extra"):
        if not isinstance(known.get(name, {}), dict):
            raise ManifestError(f"{name} must be an object")
    if type(known.get("branch", 0)) is not int:
        raise ManifestError("branch must be int")
    if not isinstance(known.get("name", ""), str):
        raise ManifestError("name must be a text")
    if type(known.get("created", 0.0)) not in (int, float):
        raise ManifestError("created must be a number")
    return Manifest(**{**known, "files": files, "is_folder": bool(record.get("is_folder"))})


def check_entry(entry: FileEntry) -> None:
    if type(entry.size) is not int or entry.size < 0:
        raise ManifestError("a file's size must be a number >= 0")
    if not isinstance(entry.digest, str) or len(entry.digest) != 32 or set(entry.digest) - set("0123456789abcdef"):
        raise ManifestError("a file's digest must be 32 hex digits")
    check_relative(entry.path)


def check_relative(path: object) -> None:
    """Raise ManifestError unless `path` stays below the checkpoint: relative, no ``..``, no control characters."""
    if not isinstance(path, str) or len(path) > MAX_NAME:
        raise ManifestError("a file's path must be a short text")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ManifestError(f"a file's path must be one that a file system can hold: {path!r}") from None
    if path == "":
        return
    pure = PurePosixPath(path)
    plain = str(pure) == path and path != "."
    if pure.is_absolute() or ".." in pure.parts or not plain or any(ord(letter) < 32 for letter in path):
        raise ManifestError(f"a file's path may not leave the checkpoint: {path!r}")
