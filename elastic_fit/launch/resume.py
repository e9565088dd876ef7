"""Choosing the points that a run goes on from: once per attempt, by one node, before any worker starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_fit.supervisor.context import ResumePoint
from elastic_fit.supervisor.errors import NoValidCheckpoint, StorageError, UsageError
from elastic_fit.supervisor.ledger import Ledger, read
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import (
    Checkpoint,
    CheckpointStore,
    GenerationFence,
    Rejected,
    Selection,
    verify,
)
from elastic_fit.supervisor.store.digest import never
from elastic_fit.supervisor.store.generation import MENDED_BY
from elastic_fit.supervisor.store.parts import Unfinished, unfinished
from elastic_fit.supervisor.wish import EVENT, Wish, is_news, settle

if TYPE_CHECKING:
    from elastic_fit.launch.parser import Invocation

_FIT = re.compile(r"fit-(\d+)")


class ResumeChooser:
    """Finds, for every ``fit`` call that has saved something, the newest valid checkpoint.

    Args:
        folder: the run's folder.
        ledger: gets a ``resume`` event per fit, with every rejected candidate and its reason; None to leave no trace.
        invocation: may name a checkpoint to go on from (``--resume-from``).
        tell: shows a person a line: each checkpoint that is passed over, or taken although it shouldn't be, and why.
        generation: the fencing number that this supervisor has taken last; not asked where no trace is left.
    """

    def __init__(
        self,
        folder: RunDir,
        ledger: Ledger | None,
        invocation: Invocation,
        tell: Callable[[str], None] = lambda _: None,
        *,
        generation: Callable[[], int] = lambda: 0,
    ) -> None:
        self._generation = generation
        self._folder = folder
        self._ledger = ledger
        self._invocation = invocation
        self._tell = tell
        self._told: set[Rejected] = set()

    def settle(self, generation: int) -> Wish:
        """What the run, which begins under that generation, goes on from by this command. Once for all its nodes."""
        asked, job = self._invocation.resume_from, self._invocation.job
        mine = Wish(
            path=str(asked.resolve()) if asked else None,
            command=(self._invocation.script, *self._invocation.script_args),
            job=job.job_id if job is not None else None,
            generation=generation,
        )
        events = read(self._folder.events) if asked or self._ledger is not None else []
        settled = settle(mine, events)
        if self._ledger is not None and is_news(settled, events):
            self._ledger.write(EVENT, **asdict(settled))
        if settled.generation < generation:
            self._tell(f"--resume-from {settled.path} was followed before: what was saved since is gone on from")
        return settled

    def __call__(self, wish: Wish, is_told: Callable[[], bool] = never) -> tuple[ResumePoint, ...]:
        """The points to go on from, by number of the fit.

        Args:
            wish: as settled when the run began, by this node or another one.
            is_told: asked while checkpoints are read, by any thread, whether to leave off.

        Raises LeftOff where it says so, NoValidCheckpoint where there are checkpoints and none of them can be used,
        FencedOff where another supervisor has taken the run.
        """
        fits = sorted({*self._fits(), *([1] if wish.path else [])})
        lost = {fit: unfinished(self._folder.fit(fit)) for fit in fits}
        if self._ledger is not None:
            self._sweep(self._ledger)
        points = tuple(point for number in fits if (point := self._choose(number, wish, is_told)) is not None)
        self._tell_unfinished(lost, {point.fit: point.step for point in points})
        return points

    def _fits(self) -> list[int]:
        try:
            names = [entry.name for entry in self._folder.checkpoints.iterdir() if entry.is_dir()]
        except FileNotFoundError:
            return []  # a run that has not begun
        except OSError as error:
            raise StorageError(f"can't read {self._folder.checkpoints}: {error.strerror}") from error
        return sorted(int(found[1]) for name in names if (found := _FIT.fullmatch(name)))

    def _sweep(self, ledger: Ledger) -> None:
        """Remove what interrupted saves have left: no worker of this run is alive when its resume point is chosen.

        Those of a newer generation may be: they are another supervisor's, and so is the run then.
        """
        own = self._generation()
        fence = GenerationFence(self._folder, own)
        try:
            fence.check()
        except OSError as error:
            raise StorageError(f"can't tell whose the run is: {error.strerror}", hint=MENDED_BY) from error
        stores = [CheckpointStore(self._folder.fit(fit), fence=fence, generation=own + 1) for fit in self._fits()]
        swept = [str(store.root / name) for store in stores for name in store.sweep()]
        if swept:
            ledger.write("swept", names=swept)

    def _tell_unfinished(self, lost: Mapping[int, Sequence[Unfinished]], safe: Mapping[int, int]) -> None:
        """Say what survivors have saved of steps that are lost all the same: not all shards of them were there."""
        for fit, found in lost.items():
            newer = [one for one in found if one.step > safe.get(fit, 0)]
            if newer and self._ledger is not None:
                step, safe_step = newer[0].step, safe.get(fit, 0)
                why = "; ".join(one.why for one in newer)
                self._ledger.write("no_rescue", step=step, why=why, safe_step=safe_step, lost=step - safe_step)
                self._tell(f"{step - safe_step} steps since step {safe_step} are lost: {why}")

    def _choose(self, fit: int, wish: Wish, is_told: Callable[[], bool]) -> ResumePoint | None:
        selection = CheckpointStore(self._folder.fit(fit)).latest_valid(is_told=is_told)
        if wish.path is not None and fit == 1 and not _is_since(wish, selection):
            selection = self._named(Path(wish.path), is_told)
        chosen = selection.chosen
        self._note(fit, selection)
        if chosen is None and selection.rejected:
            raise _all_rejected(self._folder.fit(fit), selection)
        self._tell_rejected(chosen, selection)
        return _point(fit, chosen) if chosen else None

    def _named(self, path: Path, is_told: Callable[[], bool]) -> Selection:
        """The checkpoint that was asked for."""
        if not path.exists():
            raise UsageError(f"there is no checkpoint {path}", hint="elastic-fit ls RUN_DIR lists those of a run")
        verdict = verify(path, is_told=is_told)
        if verdict.manifest is None or not (verdict.valid or self._invocation.force):
            raise NoValidCheckpoint(
                f"{path} can't be resumed from: {verdict.why}",
                hint="--force takes a checkpoint that has a manifest but does not verify",
            )
        rejected = () if verdict.valid else (Rejected(path=path, why=verdict.why),)
        chosen = Checkpoint(path=path, manifest=verdict.manifest)
        return Selection(chosen=chosen, rejected=rejected, verified=verdict.depth if verdict.valid else "forced")

    def _tell_rejected(self, chosen: Checkpoint | None, selection: Selection) -> None:
        for one in (*selection.rejected, *selection.unfit):
            if one not in self._told:
                self._told.add(one)
                is_forced = chosen is not None and one.path == chosen.path
                self._tell(f"{'forced' if is_forced else 'passed over'}: {one.path}: {one.why}")

    def _note(self, fit: int, selection: Selection) -> None:
        if self._ledger is None:
            return
        chosen = selection.chosen
        self._ledger.write(
            "resume",
            fit=fit,
            path=str(chosen.path) if chosen else None,
            step=chosen.manifest.step if chosen else 0,
            generation_of_checkpoint=chosen.manifest.generation if chosen else None,
            verified=selection.verified or None,
            rejected=[{"path": str(one.path), "why": one.why} for one in selection.rejected],
        )


def _is_since(wish: Wish, own: Selection) -> bool:
    """Whether the run has saved a checkpoint of its own since it began with that wish."""
    return own.chosen is not None and own.chosen.manifest.generation >= wish.generation


def _point(fit: int, chosen: Checkpoint) -> ResumePoint:
    manifest = chosen.manifest
    return ResumePoint(
        fit=fit,
        path=str(Path(str(chosen.path)).absolute()),
        step=manifest.step,
        generation=manifest.generation,
        kind=manifest.kind,
        finished=bool(manifest.extra.get("finished")),
        ended_early=bool(manifest.extra.get("ended_early")),
    )


def _all_rejected(folder: Path, selection: Selection) -> NoValidCheckpoint:
    reasons = "\n".join(f"  {one.path}: {one.why}" for one in selection.rejected)
    return NoValidCheckpoint(
        f"none of the checkpoints in {folder} can be used:\n{reasons}",
        hint="start over with --fresh (the old folder is kept beside the new one), or mend the storage",
    )
