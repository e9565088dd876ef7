"""What checkpoints there are below a folder, and what is true of each: plain data for the commands that list them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, Verdict, is_remote, local_path, open_store, verify

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One checkpoint as ``elastic-fit ls --json`` tells of it. What only its manifest knows is None without one."""

    path: str
    step: int | None
    epoch: int | None
    kind: str | None
    reason: str | None
    generation: int | None
    branch: int | None
    """0, and one more each time that a training went back behind what was there: the highest is the newest."""
    finished: bool | None
    """Whether its fit had ended; of two of one branch, step and generation such a one is the newer."""
    weights_only: bool | None
    """Whether it holds no more than weights: no training goes on from it."""
    world_size: int | None
    valid: bool
    why: str
    """Why it isn't valid; empty where it is."""
    bytes: int | None
    created: float | None
    """When it was committed, seconds since the epoch, on the writer's wall clock."""


def inventory(place: str, *, deep: bool = False) -> list[Listed]:
    """Everything below a run folder or a folder of checkpoints, or one checkpoint, newest first.

    Args:
        place: a run folder, a folder of checkpoints, or a checkpoint; a path or a URL.
        deep: compare digests, reading every byte; else names and sizes only.

    Raises UsageError where there is nothing at `place`, StorageError where a folder can't be read.
    """
    if is_checkpoint(place):
        one = place if is_remote(place) else str(local_path(place).resolve())  # last.ckpt may be a link
        return [_listed(one, verify(one, deep=deep))]
    found = [one for store in stores(place) for one in store.scan(deep=deep)]
    listed = [_listed(str(each), verdict) for each, verdict in found]
    return sorted(
        listed,
        key=lambda one: (one.step is not None, one.branch, one.step, one.generation, one.finished, one.created),
        reverse=True,
    )


def is_checkpoint(place: str) -> bool:
    """Whether `place` names one checkpoint. Raises UsageError where a path names nothing."""
    if is_remote(place):
        return place.endswith(".ckpt")
    path = local_path(place)
    if not path.exists():
        raise UsageError(f"there is no {path}", hint="give a run folder (runs/<name>) or a checkpoint")
    return path.is_file() or path.suffix == ".ckpt"


def stores(place: str, *, generation: int = 0) -> list[CheckpointStore]:
    """The folders of checkpoints of a run, or the one at `place`. Raises UsageError where a URL holds none."""
    if is_remote(place):
        store = open_store(place, generation=generation)
        if not store.candidates():
            raise UsageError(f"there are no checkpoints in {place}", hint="give the URL that they were saved to")
        return [store]
    folder = local_path(place)
    run = RunDir(folder)
    if not run.is_run():
        return [CheckpointStore(folder, generation=generation)]
    if not run.checkpoints.is_dir():
        return []
    nested = sorted(entry for entry in run.checkpoints.rglob("*") if _may_hold(entry, run.checkpoints))
    return [CheckpointStore(each, generation=generation) for each in (run.checkpoints, *nested)]


def _may_hold(entry: Path, root: Path) -> bool:
    """Whether `entry` is a folder of checkpoints rather than a part of one."""
    parts = entry.relative_to(root).parts
    inside = any(part.endswith(".ckpt") or part.startswith(".") for part in parts)
    return not inside and not entry.is_symlink() and entry.is_dir()


def _listed(path: str, verdict: Verdict) -> Listed:
    manifest = verdict.manifest
    return Listed(
        path=path,
        step=manifest.step if manifest else None,
        epoch=manifest.epoch if manifest else None,
        kind=manifest.kind if manifest else None,
        reason=manifest.reason if manifest else None,
        generation=manifest.generation if manifest else None,
        branch=manifest.branch if manifest else None,
        finished=bool(manifest.extra.get("finished")) if manifest else None,
        weights_only=bool(manifest.extra.get("weights_only")) if manifest else None,
        world_size=manifest.world_size if manifest else None,
        valid=verdict.valid,
        why=verdict.why,
        bytes=manifest.total_bytes if manifest else None,
        created=manifest.created if manifest else None,
    )


def as_record(listed: list[Listed]) -> dict[str, Any]:
    """The document that ``--json`` prints."""
    return {"schema_version": SCHEMA_VERSION, "checkpoints": [asdict(one) for one in listed]}
