"""Sweeping, and choosing what to go on from, without the launcher."""

from __future__ import annotations

import logging
import os

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from elastic_fit.supervisor.errors import NoValidCheckpoint, StorageError
from elastic_fit.supervisor.store import CheckpointStore, Verdict, is_remote, latest_valid, local_path, verify
from elastic_fit.supervisor.store.parts import unfinished

log = logging.getLogger("elastic_fit")


def choose(
    resume: str | os.PathLike[str] | None, dirpath: str | os.PathLike[str] | None, trainer: pl.Trainer
) -> str | None:
    """The checkpoint to go on from: decided by rank 0, told to all.

    Args:
        resume: ``"auto"``, a path, or None.
        dirpath: the folder that ``"auto"`` looks in.
        trainer: for its strategy.

    Raises NoValidCheckpoint on every rank where what there is can't be used.
    """
    if resume is None:
        return None
    answer: tuple[str | None, str | None] = (None, None)
    if trainer.is_global_zero:
        answer = _newest(dirpath) if resume == "auto" else _named(os.fspath(resume))
    path, refusal = trainer.strategy.broadcast(answer)
    if refusal:
        raise NoValidCheckpoint(refusal, hint="move the folder away to start over, or give resume= a checkpoint")
    return path


def approved(path: str | os.PathLike[str] | None, trainer: pl.Trainer) -> str | os.PathLike[str] | None:
    """`path` as it was given to ``fit``, if it holds or has no seal: what others have written Lightning loads as ever.

    Raises NoValidCheckpoint on every rank where it is sealed and isn't what was saved, as rank 0 sees it.
    """
    if not path:
        return path
    refusal = None
    if trainer.is_global_zero:
        real, verdict = _verified(os.fspath(path))
        refusal = None if verdict.valid or not verdict.is_sealed else _refusal(real, verdict)
    refusal = trainer.strategy.broadcast(refusal)
    if refusal:
        raise NoValidCheckpoint(refusal, hint="without its manifest it is loaded as any file is, whatever it holds")
    return path


def sweep(store: CheckpointStore) -> None:
    """Remove what interrupted saves have left, and say what is lost with it: shards that never came together.

    Raises StorageError where the folder can't be read.
    """
    lost = [] if is_remote(store.root) else unfinished(store.root)
    store.sweep()
    safe = next((one.manifest.step for one in store.valid()), 0) if lost else 0
    newer = [one for one in lost if one.step > safe]
    if newer:
        why = "; ".join(one.why for one in newer)
        log.warning("elastic-fit: %d steps since step %d are lost: %s", newer[0].step - safe, safe, why)


def _newest(dirpath: str | os.PathLike[str] | None) -> tuple[str | None, str | None]:
    if dirpath is None:
        return None, "resume='auto' needs to know the folder: give ElasticCheckpoint a dirpath"
    try:
        selection = latest_valid(os.fspath(dirpath))
    except StorageError as error:
        return None, error.message  # the other ranks wait for an answer
    for one in (*selection.rejected, *selection.unfit):
        rank_zero_info(f"elastic-fit: not resuming from {one.path}: {one.why}")
    if selection.chosen is not None:
        return str(selection.chosen.path), None
    if selection.rejected:
        return None, f"none of the {len(selection.rejected)} checkpoints in {dirpath} can be used"
    found = (
        f"nothing in {dirpath} that a training could go on from" if selection.unfit else f"no checkpoint in {dirpath}"
    )
    rank_zero_info(f"elastic-fit: {found}: starting at step 0")
    return None, None


def _named(path: str) -> tuple[str | None, str | None]:
    path, verdict = _verified(path)
    return (path, None) if verdict.valid else (None, _refusal(path, verdict))


def _verified(path: str) -> tuple[str, Verdict]:
    """The checkpoint itself, where that is the name of a link, and whether it is whole."""
    path = path if is_remote(path) else str(local_path(path).resolve())
    return path, verify(path)


def _refusal(path: str, verdict: Verdict) -> str:
    return f"{path} can't be resumed from: {verdict.why}"
