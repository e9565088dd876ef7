"""What checkpoints there are below a folder, and what is true of each: plain data for the commands that list them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, Verdict, verify

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
    world_size: int | None
    valid: bool
    why: str
    """Why it isn't valid; empty where it is."""
    bytes: int | None
    created: float | None
    """When it was committed, seconds since the epoch, on the writer's wall clock."""


def inventory(path: Path, *, deep: bool = False) -> list[Listed]:
    """Everything below a run folder or a folder of checkpoints, or one checkpoint, newest first.

    Args:
        path: a run folder, a folder of checkpoints, or a checkpoint.
        deep: compare digests, reading every byte; else names and sizes only.

    Raises UsageError where there is nothing at `path`, StorageError where a folder can't be read.
    """
    if not path.exists():
        raise UsageError(f"there is no {path}", hint="give a run folder (runs/<name>) or a checkpoint")
    if path.is_file() or path.suffix == ".ckpt":
        path = path.resolve()  # last.ckpt may be a link
        return [_listed(path, verify(path, deep=deep))]
    found = [one for store in _stores(path) for one in store.scan(deep=deep)]
    listed = [_listed(each, verdict) for each, verdict in found]
    return sorted(listed, key=lambda one: (one.step is not None, one.step, one.generation, one.created), reverse=True)


def _stores(folder: Path) -> list[CheckpointStore]:
    run = RunDir(folder)
    if not run.identity.exists():
        return [CheckpointStore(folder)]
    if not run.checkpoints.is_dir():
        return []
    nested = sorted(entry for entry in run.checkpoints.rglob("*") if _may_hold(entry, run.checkpoints))
    return [CheckpointStore(each) for each in (run.checkpoints, *nested)]


def _may_hold(entry: Path, root: Path) -> bool:
    """Whether `entry` is a folder of checkpoints rather than a part of one."""
    parts = entry.relative_to(root).parts
    inside = any(part.endswith(".ckpt") or part.startswith(".") for part in parts)
    return not inside and not entry.is_symlink() and entry.is_dir()


def _listed(path: Path, verdict: Verdict) -> Listed:
    manifest = verdict.manifest
    return Listed(
        path=str(path),
        step=manifest.step if manifest else None,
        epoch=manifest.epoch if manifest else None,
        kind=manifest.kind if manifest else None,
        reason=manifest.reason if manifest else None,
        generation=manifest.generation if manifest else None,
        world_size=manifest.world_size if manifest else None,
        valid=verdict.valid,
        why=verdict.why,
        bytes=manifest.total_bytes if manifest else None,
        created=manifest.created if manifest else None,
    )


def as_record(listed: list[Listed]) -> dict[str, Any]:
    """The document that ``--json`` prints."""
    return {"schema_version": SCHEMA_VERSION, "checkpoints": [asdict(one) for one in listed]}
