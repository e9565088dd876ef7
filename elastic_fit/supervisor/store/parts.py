"""A checkpoint that is put together from parts, none of whose writers depends on another one.

Survivors of a job don't know who else is alive. So each writes its part into a hidden folder of its own, gives that
the name of a part when it is durable, and looks whether it was the last one that was missing. Whoever finds all of
them claims them, has their files in a folder of its own as well, and commits that. Nobody ever writes into a folder
that another one writes into or commits, and the parts stay as they are until there is a checkpoint.

The claim is one name that all of them know, and whoever makes it holds it until it is done. Those on the same node wait
for that, and look whether the checkpoint is there by now: if not, the next one takes the claim. On another node nobody
can tell whether its holder still lives.

All names are in the checkpoint's folder: on a network file system, whoever has changed a folder sees what others had
changed in it before. Each tells whose it is, as those of all that is being written do, and is swept by the same rule.
What never came together is found by who sweeps, and says by itself what it lacks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store.commit import DigestingFile, Staged
from elastic_fit.supervisor.store.disk import (
    CLAIM,
    PART,
    TEMPORARY,
    Token,
    exists,
    hidden_path,
    locked,
    make_folders,
    new_token,
    remove_tree,
)
from elastic_fit.supervisor.store.folder import CheckpointStore
from elastic_fit.supervisor.store.manifest import MAX_BYTES, FileEntry, check_entry
from elastic_fit.supervisor.store.staging import SaveFailed
from elastic_fit.supervisor.store.trust import check_folder, distrust, read_small
from elastic_fit.supervisor.store.verify import verify

RECORD = "part.json"
NO_RECORD = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""What opening one says where there is none: it has gone meanwhile, or there is a link or a socket in its place."""

_FOLDER = re.compile(
    r"\.(?P<name>.+)(?P<state>\.(?:tmp|part)-)[0-9a-z-]+-(?P<meeting>[0-9a-f]{8})-(?P<shard>\d{1,9})", re.DOTALL
)


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

    def __post_init__(self) -> None:
        numbers = (self.step, self.shard, self.rank, *(rank for ranks in self.holders for rank in ranks))
        if any(type(one) is not int or one < 0 for one in numbers) or self.shard >= len(self.holders):
            raise ValueError("step, shard and ranks must be numbers >= 0, and the shard one of those that are held")
        if not all(self.holders):
            raise ValueError("somebody must have held every shard")
        for entry in self.files:
            check_entry(entry)

    def to_json(self) -> str:
        """The text of its record."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str | bytes) -> Part:
        """From the text of its record.

        Raises ValueError, KeyError, TypeError, RecursionError or StorageError where it isn't one.
        """
        record: dict[str, Any] = dict(json.loads(text))
        holders = tuple(tuple(ranks) for ranks in record.pop("holders"))
        files = tuple(FileEntry(**entry) for entry in record.pop("files"))
        return cls(**record, holders=holders, files=files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A part, and where it is."""

    folder: Path
    part: Part

    @property
    def files(self) -> dict[Path, FileEntry]:
        """Its files, where they are."""
        return {self.folder / entry.path: entry for entry in self.part.files}


class Meeting:
    """Where the parts of one checkpoint come together.

    Args:
        store: where the checkpoint belongs.
        name: its name there.
        token: eight hex digits that all of its writers share, and no others.
    """

    def __init__(self, store: CheckpointStore, name: str, token: str) -> None:
        self._store = store
        self._name = name
        self._token = token
        self._disk = store.disk
        self._claim = store.root / f".{name}{CLAIM}{store.generation}-{token}"

    @contextlib.contextmanager
    def stage(self, shard: int) -> Iterator[Staged | None]:
        """A folder to write a shard into, and to `leave`; None where the shard is there, or all of them are.

        Those on one node that hold the same shard take turns, so that only one of them writes it as long as none dies.
        Raises StorageError where the disk refuses.
        """
        staged = self._store.join(self._name, self._path(TEMPORARY, shard))
        with staged.failing():
            make_folders(self._store.root, self._disk)
            check_folder(self._store.root)
            self.wait_for_writers(shard)
            is_wanted = not exists(self._claim) and shard not in self.parts()
        if not is_wanted:
            yield None
            return
        with staged:
            staged.mkdir()
            with locked(staged.path):
                yield staged

    def join(self) -> Staged:
        """To put the checkpoint together in: a place that is this process's alone."""
        target = self._store.root / self._name
        return self._store.join(self._name, hidden_path(target, TEMPORARY, self._store.generation))

    def is_over(self) -> bool:
        """Whether this generation has committed the checkpoint, and it is no other branch's."""
        verdict = verify(self._store.root / self._name, deep=False)
        return verdict.valid and verdict.manifest is not None and self._store.wrote(verdict.manifest)

    def leave(self, staged: Staged, part: Part) -> None:
        """Say that a part is whole: all of its files are durable. Raises StorageError where the disk refuses."""
        with staged.failing():
            with DigestingFile(staged.path / RECORD, "", self._disk) as file:
                file.write(part.to_json().encode())
            self._disk.sync_folder(staged.path)
            self._disk.rename(staged.path, self._path(PART, part.shard))
            self._disk.sync_folder(self._store.root)

    def parts(self) -> dict[int, Left]:
        """What has been left so far, by shard. Raises OSError where the disk refuses."""
        found: dict[int, Left] = {}
        for folder in self._folders(PART):
            part = _read(folder)
            if part is not None:
                found.setdefault(part.shard, Left(folder=folder, part=part))
        return found

    def wait_for_writers(self, shard: int | None = None) -> None:
        """Come back when whoever is writing a shard, or that one, has left it or is dead, as far as locks reach."""
        for folder in self._folders(TEMPORARY, shard):
            with contextlib.suppress(FileNotFoundError), locked(folder):
                pass

    @contextlib.contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether the parts are this process's, meanwhile: of all that ask at once, they are of one at a time.

        Raises SaveFailed where the disk refuses.
        """
        with locked(self._store.root) as is_locked:
            try:
                if is_locked:
                    self._take_from_the_dead()
                self._disk.symlink(new_token(self._store.generation), self._claim)
            except FileExistsError:
                is_mine = False
            except OSError as error:
                raise SaveFailed(self._store.root / self._name, error) from error
            else:
                is_mine = True
            try:
                yield is_mine
            finally:
                if is_mine:
                    with contextlib.suppress(OSError):  # the next one does it, or the next sweep
                        self._disk.unlink(self._claim)

    def _take_from_the_dead(self) -> None:
        """End the claim of a process of this node that doesn't hold the lock any more."""
        with contextlib.suppress(FileNotFoundError):  # nobody has claimed them, or not any more
            token = Token.parse(os.readlink(self._claim))
            if token is not None and token.is_local:
                self._disk.unlink(self._claim)

    def add(self, files: Mapping[Path, FileEntry], staged: Staged) -> list[FileEntry]:
        """Have files of parts, which stay as they are, in what is staged as well; returns those it hasn't written.

        Raises StorageError where one is not what its record says, or the disk refuses.
        """
        shared = []
        with staged.failing():
            for path, entry in files.items():
                if (size := path.stat().st_size) != entry.size:
                    raise StorageError(f"{path} has {size} bytes, its record says {entry.size}")
                try:
                    self._disk.link(path, staged.path / entry.path)
                except OSError:  # not every file system has a file in two folders
                    with path.open("rb") as source, staged.open_part(entry.path) as copy:
                        shutil.copyfileobj(source, copy)
                    if copy.entry() != entry:
                        raise StorageError(f"{path} is not what its record says") from None
                else:
                    shared.append(entry)
        return shared

    def clear(self) -> None:
        """Remove what has been left: it is in the checkpoint."""
        for folder in self._folders(PART):
            with contextlib.suppress(OSError):  # somebody else is at it, or the next sweep does it
                remove_tree(folder, self._disk)

    def _path(self, state: str, shard: int) -> Path:
        target = self._store.root / self._name
        return target.with_name(f"{hidden_path(target, state, self._store.generation).name}-{self._token}-{shard}")

    def _folders(self, state: str, shard: int | None = None) -> list[Path]:
        return [
            self._store.root / found[0]
            for found in _folders(self._store.root, state)
            if (found["name"], found["meeting"]) == (self._name, self._token) and shard in (None, int(found["shard"]))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """The parts of a checkpoint that never came together."""

    step: int
    why: str


def unfinished(root: Path) -> list[Unfinished]:
    """What never came together in a folder of checkpoints, newest first. For who is about to sweep it."""
    met: dict[tuple[str, str], dict[int, Part]] = {}
    with contextlib.suppress(OSError):  # it only tells; who goes on to sweep says what can't be read
        for found in _folders(root, PART):
            part = _read(root / found[0])
            if part is not None:
                met.setdefault((found["name"], found["meeting"]), {})[part.shard] = part
    told = [Unfinished(step=next(iter(parts.values())).step, why=why_unfinished(parts)) for parts in met.values()]
    return sorted(told, key=lambda one: one.step, reverse=True)


def missing(holders: Collection[Collection[int]], shards: Collection[int]) -> list[int]:
    """The shards that nobody has left."""
    return [shard for shard in range(len(holders)) if shard not in shards]


def why_unfinished(parts: Mapping[int, Part]) -> str:
    """Why these parts, at least one, are no checkpoint."""
    one = next(iter(parts.values()))
    lacking = missing(one.holders, parts)
    if not lacking:
        return (
            f"all {len(one.holders)} shards of step {one.step} were saved, and who was to put them together could not"
        )
    held = ", ".join(f"shard {shard} (held by ranks {_listed(one.holders[shard])})" for shard in lacking)
    return f"of the {len(one.holders)} shards of step {one.step} nobody has left {held}"


def _listed(ranks: Collection[int]) -> str:
    *others, last = map(str, ranks)
    return f"{', '.join(others)} and {last}" if others else last


def _folders(root: Path, state: str) -> list[re.Match[str]]:
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return []
    return [found for name in names if (found := _FOLDER.fullmatch(name)) and found["state"] == state]


def _read(folder: Path) -> Part | None:
    """None where it makes no sense, or somebody else may have written it, or it has gone meanwhile."""
    try:
        if distrust(folder.lstat()):
            return None
        return Part.parse(read_small(folder, RECORD, MAX_BYTES))
    except (ValueError, KeyError, TypeError, RecursionError, StorageError):
        return None
    except OSError as error:
        if error.errno in NO_RECORD:
            return None
        raise
