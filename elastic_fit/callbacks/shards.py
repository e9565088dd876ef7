"""Sealed saves of sharded strategies: all ranks write into one staged place, and rank 0 commits what all have written.

What comes of it is the same on all ranks: committed, or failed for the same reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import lightning.pytorch as pl
import xxhash
from torch.distributed.checkpoint.api import CheckpointException

from elastic_fit.callbacks import _lightning
from elastic_fit.callbacks.collective import gather
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store import CheckpointStore, Facts, FileEntry, SaveFailed, Staged
from elastic_fit.supervisor.store.staging import twice_if_it_may_pass

META_TEMPORARY = ".tmp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank tells the others of its part."""

    entries: tuple[FileEntry, ...] = ()
    refusals: Mapping[int, OSError] = field(default_factory=dict)
    """What a disk said, by rank: its own, or what it was told of others."""
    mistake: str | None = None
    """What else went wrong."""


def write_together(
    trainer: pl.Trainer, write: Callable[[str], None], store: CheckpointStore, name: str, facts: Facts
) -> int:
    """Have every rank `write` its part below a path, and commit it; returns its bytes. Collective.

    What may pass (an I/O error, on whichever rank) is met once with new files. Raises on all ranks alike SaveFailed
    where a disk refuses for good, FencedOff where a newer generation has taken the run.
    """
    return twice_if_it_may_pass(lambda: _write(trainer, write, store, name, facts))


def _write(trainer: pl.Trainer, write: Callable[[str], None], store: CheckpointStore, name: str, facts: Facts) -> int:
    strategy = trainer.strategy
    staged, refusal = _begin(store, name) if trainer.is_global_zero else (None, None)
    where, refusal = strategy.broadcast((str(staged.path) if staged else None, refusal))
    if refusal is not None:
        raise refusal
    mine = staged or store.join(name, Path(str(where)))
    report, problem = write_part(mine, write, trainer.global_rank)
    outcome: int | StorageError = 0
    try:
        reports = gather(report)
        if problem is not None and report.mistake:
            raise problem
        if failure := _failure(store.root / name, reports):
            raise failure from problem
        if staged is not None:
            outcome = _commit(staged, [entry for one in reports for entry in one.entries], facts)
    finally:
        if staged is not None:
            staged.discard()
        strategy.barrier("elastic_fit.seal")
    outcome = strategy.broadcast(outcome)
    if isinstance(outcome, StorageError):
        raise outcome
    return outcome


def _begin(store: CheckpointStore, name: str) -> tuple[Staged | None, StorageError | None]:
    """What is staged, or why not: the other ranks have to hear of either."""
    try:
        return store.stage(name), None
    except StorageError as error:
        return None, error


def write_part(mine: Staged, write: Callable[[str], None], rank: int) -> tuple[Report, BaseException | None]:
    """Have this rank `write` its part below a path; returns what there is to tell, and what went wrong."""
    path = mine.path
    try:
        with _lightning.shards_written_to(str(path), lambda shard: mine.open_part(os.path.relpath(shard, path))):
            write(str(path))
        return Report(entries=tuple(_final_name(entry) for entry in mine.digests())), None
    except (OSError, RuntimeError, CheckpointException) as problem:
        refusals = _refusals(problem, mine.failure, rank)
        # Also what isn't the disk's doing: a part that one rank has left out must never be committed by another.
        return Report(refusals=refusals, mistake=None if refusals else repr(problem)), problem


def _refusals(problem: BaseException, failure: OSError | None, rank: int) -> dict[int, OSError]:
    """What disks have said, by rank, if that is what stopped a save of shards; nothing where it is something else.

    Torch's zip writer and torch.distributed.checkpoint hide it: the one behind a RuntimeError, the other behind an
    exception that all ranks get.
    """
    own = problem if isinstance(problem, OSError) else failure
    if own is not None:
        return {rank: own}
    if isinstance(problem, CheckpointException):
        told = [_refusals(one, None, other) for other, (one, _) in problem.failures.items()]
        return {other: one for each in told for other, one in each.items()} if all(told) else {}
    return {rank: OSError("the zip writer failed")} if "inline_container" in str(problem) else {}


def _failure(target: Path, reports: Sequence[Report]) -> StorageError | None:
    """What has gone wrong on any rank, the same on all of them."""
    refusals = {rank: said for one in reports for rank, said in one.refusals.items()}
    refusals.update({rank: one.refusals[rank] for rank, one in enumerate(reports) if rank in one.refusals})
    told = {rank: said.strerror or str(said) for rank, said in refusals.items()}
    mistakes = {rank: one.mistake for rank, one in enumerate(reports) if one.mistake}
    text = "; ".join(f"rank {rank}: {what}" for rank, what in sorted({**told, **mistakes}.items()))
    if mistakes:
        return StorageError(f"could not write {target}: {text}")
    failures = [SaveFailed(target, OSError(said.errno or 0, text)) for said in refusals.values()]
    return next((one for one in failures if not one.may_pass), next(iter(failures), None))


def _commit(staged: Staged, entries: list[FileEntry], facts: Facts) -> int | StorageError:
    """Commit what all ranks have written, and return its bytes, or why not: the other ranks have to hear of either.

    What was written around our streams is digested from disk.
    """
    known = {entry.path for entry in entries}
    try:
        if staged.path.is_file():
            return staged.commit_entries(facts, [*entries, _digest(staged.path, "")]).manifest.total_bytes
        found = {path.relative_to(staged.path).as_posix(): path for path in staged.path.rglob("*") if path.is_file()}
        others = [_digest(path, relative) for relative, path in sorted(found.items()) if relative not in known]
        return staged.commit_entries(facts, [*entries, *others]).manifest.total_bytes
    except OSError as error:
        return SaveFailed(staged.target, error)
    except StorageError as error:
        return error


def _digest(path: Path, relative: str) -> FileEntry:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
        os.fsync(file.fileno())
    return FileEntry(path=relative, size=path.stat().st_size, digest=digest.hexdigest())


def _final_name(entry: FileEntry) -> FileEntry:
    """The writer of shards gives its metadata file its name by rename, after it has closed it."""
    return replace(entry, path=entry.path.removesuffix(META_TEMPORARY))
