"""A checkpoint that is put together from parts, whose writers don't wait for one another.

Survivors of a job don't know who else is alive. So each leaves its part in a hidden folder whose name all of them know,
and looks whether it was the last one that was missing: whoever finds all of them there takes the folder, puts them
together and commits. A part is there once its record is, whose rename is the last thing that its writer does. All
records are in one folder: on a network file system, whoever changes a folder sees what others had changed in it before.

What never came together is found by who sweeps, and says by itself what it lacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_fit.supervisor.store.commit import DigestingFile, Staged
from elastic_fit.supervisor.store.disk import TEMPORARY, Disk, Hidden, hidden_path, make_folders, new_token
from elastic_fit.supervisor.store.folder import CheckpointStore
from elastic_fit.supervisor.store.manifest import FileEntry

_RECORD = re.compile(r"shard-(\d{1,9})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank has left: everything of one shard of the state."""

    step: int
    """Optimizer steps that this is the state after."""
    shard: int
    rank: int
    holders: tuple[tuple[int, ...], ...]
    """By number of the shard: the ranks that held it, dead or alive."""
    files: tuple[FileEntry, ...]

    def to_json(self) -> str:
        """The text of its record."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Part:
        """From the text of its record. Raises ValueError, KeyError or TypeError where it isn't one."""
        record: dict[str, Any] = json.loads(text)
        holders = tuple(tuple(int(rank) for rank in ranks) for ranks in record.pop("holders"))
        files = tuple(FileEntry(**entry) for entry in record.pop("files"))
        return cls(**record, holders=holders, files=files)


class Meeting:
    """The folder in which the parts of one checkpoint come together.

    Args:
        store: where the checkpoint belongs.
        name: its name there.
        token: what all of its writers share, and no others: by `new_token`, made by one of them beforehand.
    """

    def __init__(self, store: CheckpointStore, name: str, token: str, *, disk: Disk | None = None) -> None:
        self._store = store
        self._name = name
        self._disk = disk or Disk()
        self.path = store.root / f".{name}{TEMPORARY}{token}"

    def open(self, shard: int) -> Path:
        """A folder that is the shard's, made where it is missing; its writers take turns by locking it."""
        folder = self.path / f"shard-{shard}"
        make_folders(folder, self._disk)
        return folder

    def join(self) -> Staged:
        """To write files into. Not to be discarded: it is everybody's."""
        return self._store.join(self._name, self.path)

    def leave(self, part: Part) -> None:
        """Say that all files of a part are there and durable. Raises OSError where the disk refuses."""
        record = self.path / f"shard-{part.shard}.json"
        temporary = self.path / f".{record.name}.{new_token(part.rank)}"
        with DigestingFile(temporary, "", self._disk) as file:
            file.write(part.to_json().encode())
        self._disk.rename(temporary, record)

    def parts(self) -> dict[int, Part] | None:
        """What has been left so far, by shard; None where somebody has taken the folder."""
        found = _parts_in(self.path)
        return found if self.path.exists() else None

    def take(self) -> Staged | None:
        """Take the folder: what was everybody's is this process's alone. None where another one was quicker."""
        mine = hidden_path(self._store.root / self._name, TEMPORARY, self._store.generation)
        try:
            self._disk.rename(self.path, mine)
        except FileNotFoundError:
            return None
        return self._store.join(self._name, mine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """The parts of a checkpoint that never came together."""

    step: int
    why: str


def unfinished(root: Path) -> list[Unfinished]:
    """What never came together in a folder of checkpoints, newest first. For who is about to sweep it."""
    names = sorted(os.listdir(root)) if root.is_dir() else []
    found = [_parts_in(root / name) for name in names if Hidden.parse(name) is not None]
    told = [Unfinished(step=next(iter(parts.values())).step, why=why_unfinished(parts)) for parts in found if parts]
    return sorted(told, key=lambda one: one.step, reverse=True)


def missing(holders: Collection[Collection[int]], parts: Mapping[int, Part]) -> list[int]:
    """The shards that nobody has left."""
    return [shard for shard in range(len(holders)) if shard not in parts]


def why_unfinished(parts: Mapping[int, Part]) -> str:
    """Why these parts, at least one, are no checkpoint."""
    one = next(iter(parts.values()))
    lacking = missing(one.holders, parts)
    if not lacking:
        return f"all {len(one.holders)} shards of step {one.step} were saved, and who was to put them together has died"
    held = ", ".join(f"shard {shard} (held by ranks {_listed(one.holders[shard])})" for shard in lacking)
    return f"of the {len(one.holders)} shards of step {one.step} nobody has left {held}"


def _listed(ranks: Collection[int]) -> str:
    *others, last = map(str, ranks)
    return f"{', '.join(others)} and {last}" if others else last


def _parts_in(folder: Path) -> dict[int, Part]:
    """By shard. A record that makes no sense is none, and a folder that isn't there, or is a file, has none."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for name in filter(_RECORD.fullmatch, names):
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            part = Part.parse((folder / name).read_text())
            found[part.shard] = part
    return found
