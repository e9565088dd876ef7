"""Choosing the points that a run goes on from: once per attempt, by one node, before any worker starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_fit.supervisor.context import ResumePoint
from elastic_fit.supervisor.errors import NoValidCheckpoint, StorageError
from elastic_fit.supervisor.ledger import Ledger
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import Checkpoint, CheckpointStore, Selection

if TYPE_CHECKING:
    from elastic_fit.launch.parser import Invocation

_FIT = re.compile(r"fit-(\d+)")


class ResumeChooser:
    """Finds, for every ``fit`` call that has saved something, the newest valid checkpoint.

    Args:
        folder: the run's folder.
        ledger: gets a ``resume`` event per fit, with every rejected candidate and its reason.
        invocation: may name a checkpoint to go on from (``--resume-from``), used until the run has one of its own.
    """

    def __init__(self, folder: RunDir, ledger: Ledger, invocation: Invocation) -> None:
        self._folder = folder
        self._ledger = ledger
        self._invocation = invocation

    def __call__(self) -> tuple[ResumePoint, ...]:
        """The points to go on from, by number of the fit.

        Raises NoValidCheckpoint where there are checkpoints and none of them can be used.
        """
        return tuple(point for number in self._fits() if (point := self._choose(number)) is not None)

    def _fits(self) -> list[int]:
        try:
            names = [entry.name for entry in self._folder.checkpoints.iterdir() if entry.is_dir()]
        except OSError as error:
            raise StorageError(f"can't read {self._folder.checkpoints}: {error.strerror}") from error
        return sorted(int(found[1]) for name in names if (found := _FIT.fullmatch(name)))

    def _choose(self, fit: int) -> ResumePoint | None:
        selection = CheckpointStore(self._folder.fit(fit)).latest_valid()
        rejected = [{"path": str(one.path), "why": one.why} for one in selection.rejected]
        chosen = selection.chosen
        self._ledger.write(
            "resume",
            fit=fit,
            path=str(chosen.path) if chosen else None,
            step=chosen.manifest.step if chosen else 0,
            rejected=rejected,
        )
        if chosen is None and rejected:
            raise _all_rejected(self._folder.fit(fit), selection)
        return _point(fit, chosen) if chosen else None


def _point(fit: int, chosen: Checkpoint) -> ResumePoint:
    manifest = chosen.manifest
    return ResumePoint(
        fit=fit,
        path=str(Path(chosen.path).absolute()),
        step=manifest.step,
        generation=manifest.generation,
        kind=manifest.kind,
        finished=bool(manifest.extra.get("finished")),
    )


def _all_rejected(folder: Path, selection: Selection) -> NoValidCheckpoint:
    reasons = "\n".join(f"  {one.path}: {one.why}" for one in selection.rejected)
    return NoValidCheckpoint(
        f"none of the checkpoints in {folder} can be used:\n{reasons}",
        hint="start over with --fresh (the old folder is kept beside the new one), or mend the storage",
    )
