"""One folder of checkpoints: stage, find, link, remove."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store.commit import (
    DELETING,
    TEMPORARY,
    Disk,
    Fence,
    Staged,
    manifest_path,
    remove_tree,
    temporary_path,
)
from elastic_fit.supervisor.store.manifest import SUFFIX, Manifest, check_relative
from elastic_fit.supervisor.store.verify import Verdict, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A candidate that can't be used."""

    path: Path
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The newest valid checkpoint, and what was rejected on the way to it."""

    chosen: Checkpoint | None
    rejected: tuple[Rejected, ...] = ()


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
    """

    def __init__(
        self, root: Path | str, *, fence: Fence = NO_FENCE, disk: Disk | None = None, generation: int = 0
    ) -> None:
        self.root = Path(root)
        self._fence = fence
        self._disk = disk or Disk()
        self.generation = generation

    def stage(self, name: str) -> Staged:
        """Begin a checkpoint of that name. Raises StorageError where the folder can't be made or the name is taken."""
        check_relative(name)
        target = self.root / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"can't make the folder {target.parent}: {error.strerror}") from error
        path = temporary_path(target, self.generation)
        return Staged(self.root, name, path, fence=self._fence, disk=self._disk)

    def join(self, name: str, path: Path) -> Staged:
        """Another rank's view of a staged folder at `path`: it writes parts and tells their digests."""
        return Staged(self.root, name, path, fence=self._fence, disk=self._disk)

    def committed(self) -> list[Checkpoint]:
        """All that have a readable manifest, newest first; their data is not looked at."""
        found = []
        for candidate in self.candidates():
            verdict = verify(candidate, deep=False)
            if verdict.manifest is not None:
                found.append(Checkpoint(path=candidate, manifest=verdict.manifest))
        return sorted(found, key=lambda one: (one.manifest.order, one.path.name), reverse=True)

    def candidates(self) -> list[Path]:
        """Everything that has the name of a checkpoint or of a manifest; links and hidden files are left out."""
        try:
            entries = list(os.scandir(self.root))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"can't read {self.root}: {error.strerror}") from error
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

    def latest_valid(self) -> Selection:
        """Order by (step, generation), verify deeply, take the first that holds."""
        rejected: list[Rejected] = []
        for path, quick in self.scan():
            verdict = verify(path) if quick.valid else quick
            if verdict.valid and verdict.manifest is not None:
                if verdict.manifest.extra.get("weights_only"):
                    continue  # whole, but nothing that a training could go on from
                chosen = Checkpoint(path=path, manifest=verdict.manifest)
                return Selection(chosen=chosen, rejected=tuple(rejected))
            rejected.append(Rejected(path=path, why=verdict.why))
        return Selection(chosen=None, rejected=tuple(rejected))

    def remove(self, name: str) -> None:
        """Delete a checkpoint: manifest first, then data, so that nothing half-deleted looks valid."""
        target = self.root / name
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(manifest_path(target))
            self._disk.sync_folder(target.parent)
        remove_tree(target, self._disk)

    def link_last(self, name: str, link: str = "last.ckpt") -> None:
        """Point the symlink `link` at a checkpoint, by rename."""
        temporary = self.root / f".{link}{TEMPORARY}{self.generation}-{secrets.token_hex(4)}"
        os.symlink(name, temporary)
        self._disk.rename(temporary, self.root / link)

    def sweep(self) -> list[str]:
        """Remove what interrupted saves and deletions of earlier generations have left; returns their names."""
        swept = []
        for entry in self._entries():
            marked = entry.startswith(".") and (TEMPORARY in entry or DELETING in entry)
            if marked and _generation_of(entry) < self.generation:
                remove_tree(self.root / entry, self._disk)
                swept.append(entry)
        return swept

    def _entries(self) -> Iterable[str]:
        try:
            return sorted(os.listdir(self.root))
        except FileNotFoundError:
            return []


def _order(verdict: Verdict) -> tuple[int, int, bool]:
    return verdict.manifest.order if verdict.manifest else (-1, -1, False)


def _generation_of(name: str) -> int:
    number = name.rpartition(TEMPORARY)[2].split("-")[0]
    return int(number) if number.isdigit() else 0


def latest_valid(path: Path | str) -> Selection:
    """The newest valid checkpoint in a folder, with the reasons against newer ones."""
    return CheckpointStore(path).latest_valid()
