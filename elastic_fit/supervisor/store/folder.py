"""One folder of checkpoints: stage, find, link, remove."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store import leftovers
from elastic_fit.supervisor.store.commit import Staged
from elastic_fit.supervisor.store.digest import never
from elastic_fit.supervisor.store.disk import TEMPORARY, Disk, exists, hidden_path, make_folders, remove_tree
from elastic_fit.supervisor.store.generation import Fence, check_whether_replaced
from elastic_fit.supervisor.store.manifest import SUFFIX, Facts, Manifest, check_relative
from elastic_fit.supervisor.store.objects import Url, is_remote, local_path
from elastic_fit.supervisor.store.staging import SaveFailed
from elastic_fit.supervisor.store.trust import check_folder
from elastic_fit.supervisor.store.verify import Verdict, verify

READABLE = "look at its permissions, and at the disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path | Url
    """A URL where it is in an object store."""
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A candidate that can't be used."""

    path: Path | Url
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The newest valid checkpoint, and what was rejected on the way to it."""

    chosen: Checkpoint | None
    rejected: tuple[Rejected, ...] = ()
    unfit: tuple[Rejected, ...] = ()
    """Whole and newer than the chosen one, but nothing to go on from; no reason to refuse a start, either."""
    verified: str = ""
    """How the chosen one was verified: see `Verdict.depth`."""


class _NoFence:
    def check(self) -> None:
        """Everybody may commit."""


NO_FENCE: Fence = _NoFence()


class CheckpointStore:
    """A folder of checkpoints.

    Args:
        root: the folder; made when the first checkpoint is staged.
        fence: asked before every commit whether this process may still write.
        disk: the effects.
        generation: fencing number of the writer, part of temporary names.

    Attributes:
        branch: the line of history that is saved here, as far as `begin` has told.
    """

    def __init__(
        self, root: Path | str, *, fence: Fence = NO_FENCE, disk: Disk | None = None, generation: int = 0
    ) -> None:
        self.root = Path(root)
        self._fence = fence
        self.disk = disk or Disk()
        self.generation = generation
        self.branch = 0
        self._last_bytes: int | None = None

    def begin(self, step: int) -> Checkpoint | None:
        """A training begins at `step`: settle the `branch` of what it saves.

        Returns the newest checkpoint where that is of a later step: it is left behind. Raises StorageError where the
        folder can't be read.
        """
        newest = next(iter(self.committed()), None)
        self.branch = branch_at(step, newest.manifest if newest else None)
        return newest if newest and newest.manifest.branch != self.branch else None

    def wrote(self, manifest: Facts) -> bool:
        """Whether that is of this writer's generation and branch: others may have gone further, and been abandoned."""
        return (manifest.generation, manifest.branch) == (self.generation, self.branch)

    def stage(self, name: str) -> Staged:
        """Begin a checkpoint of that name.

        Raises StorageError where the folder can't be made or anybody may write into it, SaveFailed where less space
        is free than the last save took.
        """
        check_relative(name)
        target = self.root / name
        try:
            make_folders(target.parent, self.disk)
        except OSError as error:
            raise StorageError(f"can't make the folder {target.parent}: {error.strerror}") from error
        check_folder(target.parent)
        self._check_space(target)
        return self.join(name, hidden_path(target, TEMPORARY, self.generation))

    def _check_space(self, target: Path) -> None:
        needed = self._last_bytes
        if needed is None:
            newest = CheckpointStore(target.parent).committed()[:1]
            needed = newest[0].manifest.total_bytes if newest else 0
        try:
            free = self.disk.free_bytes(target.parent)
        except OSError as error:
            raise SaveFailed(target, error) from error
        if free is not None and free < needed:
            why = f"the last save took {needed} bytes, and {free} are free"
            raise SaveFailed(target, OSError(errno.ENOSPC, why))

    def join(self, name: str, path: Path) -> Staged:
        """Another rank's view of a staged folder at `path`: it writes parts and tells their digests."""
        return Staged(
            self.root, name, path, fence=self._fence, disk=self.disk, generation=self.generation, told=self._saved
        )

    def _saved(self, total_bytes: int) -> None:
        self._last_bytes = total_bytes

    def committed(self) -> list[Checkpoint]:
        """All that have a readable manifest, newest first; their data is not looked at."""
        return [Checkpoint(path=path, manifest=one.manifest) for path, one in self.scan() if one.manifest is not None]

    def valid(self) -> list[Checkpoint]:
        """What retention counts: all whose names and sizes are right and that hold no NaN, newest first."""
        quick = self.scan()
        return [Checkpoint(path=path, manifest=one.manifest) for path, one in quick if one.valid and one.manifest]

    def candidates(self) -> list[Path]:
        """Everything that has the name of a checkpoint or of a manifest; links and hidden files are left out.

        Raises StorageError where the folder can't be read, or anybody may write into it.
        """
        check_folder(self.root)
        try:
            entries = list(os.scandir(self.root))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"can't read {self.root}: {error.strerror}", hint=READABLE) from error
        names = set()
        for entry in entries:
            if entry.name.startswith(".") or entry.is_symlink():
                continue
            if entry.name.endswith(SUFFIX):
                names.add(entry.name.removesuffix(SUFFIX))
            elif entry.name.endswith(".ckpt"):
                names.add(entry.name)
        return [self.root / name for name in sorted(names)]

    def scan(self, *, deep: bool = False) -> list[tuple[Path, Verdict]]:
        """Every candidate with its verdict, newest first, unreadable ones last."""
        verdicts = [(path, verify(path, deep=deep)) for path in self.candidates()]
        return sorted(verdicts, key=lambda one: (_order(one[1]), one[0].name), reverse=True)

    def latest_valid(self, *, is_told: Callable[[], bool] = never) -> Selection:
        """Order by (branch, step, generation), verify deeply, take the first that holds.

        Whatever has no readable manifest may be newer, for all that can be told: it counts as rejected.
        Raises LeftOff where `is_told` says so, which is asked while the files are read.
        """
        quick = self.scan()
        rejected = [Rejected(path=path, why=verdict.why) for path, verdict in quick if verdict.manifest is None]
        unfit: list[Rejected] = []
        for path, verdict in quick:
            if verdict.manifest is None:
                continue
            if verdict.valid:
                verdict = verify(path, is_told=is_told)
            if verdict.valid and verdict.manifest is not None:
                if verdict.manifest.extra.get("weights_only"):
                    unfit.append(Rejected(path=path, why="it holds weights only"))
                    continue
                chosen = Checkpoint(path=path, manifest=verdict.manifest)
                return Selection(chosen=chosen, rejected=tuple(rejected), unfit=tuple(unfit), verified=verdict.depth)
            rejected.append(Rejected(path=path, why=verdict.why))
        return Selection(chosen=None, rejected=tuple(rejected), unfit=tuple(unfit))

    def remove(self, name: str) -> None:
        """Delete a checkpoint. Raises StorageError where the disk refuses; the next sweep finishes what has begun."""
        check_relative(name)
        target = self.root / name
        try:
            leftovers.remove(target, self.disk, self._fence, self.generation)
        except OSError as error:
            check_whether_replaced(self._fence)
            raise StorageError(f"could not remove {target}: {error.strerror or error}") from error

    def link_last(self, name: str, link: str = "last.ckpt") -> None:
        """Point the symlink `link` at a checkpoint, by rename. Raises StorageError where the disk refuses."""
        target = self.root / link
        temporary = hidden_path(target, TEMPORARY, self.generation)
        try:
            self._fence.check()
            if exists(target) and not target.is_symlink():
                self.remove(link)
            self.disk.symlink(name, temporary)
            try:
                self.disk.rename(temporary, target)
            except OSError:
                remove_tree(temporary, self.disk)
                raise
            self.disk.sync_folder(target.parent)
        except OSError as error:
            check_whether_replaced(self._fence)
            raise StorageError(f"could not point {target} at {name}: {error.strerror or error}") from error

    def sweep(self) -> list[str]:
        """Finish what interrupted saves and deletions of earlier generations, or of dead processes, have left.

        For who holds the run. Returns the names of what was dealt with. Raises StorageError where the folder can't be
        read.
        """
        try:
            return leftovers.sweep(self.root, self.disk, self._fence, self.generation)
        except OSError as error:
            raise StorageError(f"can't read {self.root}: {error.strerror or error}", hint=READABLE) from error

    def leftovers(self) -> list[str]:
        """What a `sweep` would deal with. Raises StorageError where the folder can't be read."""
        try:
            return leftovers.found(self.root, self.generation)
        except OSError as error:
            raise StorageError(f"can't read {self.root}: {error.strerror or error}", hint=READABLE) from error


def branch_at(step: int, newest: Facts | None) -> int:
    """The branch of a training that begins at `step` in a folder whose newest checkpoint is `newest`.

    What it saves has to be newer than all that is there: where that holds later steps, only another branch is.
    """
    return 0 if newest is None else newest.branch + (newest.step > step)


def _order(verdict: Verdict) -> tuple[int, int, int, bool]:
    return verdict.manifest.order if verdict.manifest else (-1, -1, -1, False)


def open_store(place: Path | Url | str, *, fence: Fence = NO_FENCE, generation: int = 0) -> CheckpointStore:
    """The store in a folder, or at a URL such as ``s3://bucket/run``; arguments as for `CheckpointStore`."""
    if is_remote(place):
        from elastic_fit.supervisor.store.remote import RemoteStore

        return RemoteStore(str(place), fence=fence, generation=generation)
    return CheckpointStore(local_path(place), fence=fence, generation=generation)


def latest_valid(path: Path | Url | str) -> Selection:
    """The newest valid checkpoint in a folder or at a URL, with the reasons against newer ones."""
    return open_store(path).latest_valid()
