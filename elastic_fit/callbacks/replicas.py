"""Survivors of a job whose shards have replicas (HSDP): each saves its own shard, and waits for nobody.

A *replica group* is ranks that together hold each shard once; ranks that hold the same shard, one in each group, are
equal after every optimizer step. When a rank dies, each survivor leaves its shard in a folder that is that step's:
those that hold the same one in turn, and only where it isn't there yet. Whoever finds all shards there puts them
together and commits. So it doesn't matter who survives, as long as somebody does for every shard, at the same step.
Survivors that are a step apart leave theirs in different folders, and the newest step that is whole wins.

So that survivors of one group never are, its ranks take each optimizer step together or not at all.

Nobody knows who is alive, nor has to: a member that dies over its part keeps nobody waiting, and leaves its place to
the next that holds the same shard.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist

from elastic_fit.callbacks import _sharded, session
from elastic_fit.callbacks._sharded import Layout
from elastic_fit.callbacks.collective import gather
from elastic_fit.callbacks.shards import write_part
from elastic_fit.supervisor.store import CheckpointStore, Facts, Staged
from elastic_fit.supervisor.store.disk import Disk, new_token, remove_tree
from elastic_fit.supervisor.store.parts import Meeting, Part, missing

log = logging.getLogger("elastic_fit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Who holds which shard, and where they meet when one of them dies."""

    rank: int
    """This rank."""
    holders: tuple[tuple[int, ...], ...]
    """By number of the shard: the ranks that hold it, lowest first."""
    token: str
    """What the ranks of this process group share."""
    groups: tuple[dist.ProcessGroup, ...] = ()
    """Of this rank, with those that hold the other shards of its replica group."""

    @property
    def shard(self) -> int:
        """The number of the shard that this rank holds."""
        return next(number for number, ranks in enumerate(self.holders) if self.rank in ranks)

    def step_together(self, device: torch.device) -> None:
        """Come back once all ranks of this replica group have their gradients; collective, before an optimizer's step.

        Ranks that hold the same shard sum theirs up among themselves, whatever becomes of other shards' sums. Without
        this, one that dies between two of those leaves survivors a step apart, and no step of which all shards exist.
        """
        for group in self.groups:
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    def place(self, store: CheckpointStore, name: str) -> Path:
        """The folder that those who hold the same shard lock, one at a time, to `save` it."""
        return Meeting(store, name, self.token).open(self.shard)

    def save(self, checkpoint: Mapping[str, Any], store: CheckpointStore, name: str, facts: Facts) -> int | None:
        """Leave this rank's shard of a captured state, unless it is there already, or nothing would come of it: NaN.

        Returns the checkpoint's bytes if it was the last one that was missing, and this rank has committed it. Raises
        OSError, StorageError or RuntimeError where the disk refuses.
        """
        if facts.finite is False:
            return None
        meeting = Meeting(store, name, self.token)
        shards, rest = _sharded.divide(checkpoint)
        parts = meeting.parts()
        if parts is not None and self.shard not in parts:
            self._leave(shards, meeting, facts.step)
            parts = meeting.parts()
        if parts is None:
            return None
        if lacking := missing(self.holders, parts):
            log.warning("elastic-fit: shards of step %d that nobody has saved yet: %s", facts.step, lacking)
            return None
        staged = meeting.take()
        return _put_together(staged, parts, rest, facts) if staged is not None else None

    def _leave(self, shards: dict[str, Any], meeting: Meeting, step: int) -> None:
        """Write this rank's shard. Until its record is there, nobody takes the folder."""
        report, problem = write_part(
            meeting.join(), lambda path: _sharded.write_shards(shards, path, self.rank), self.rank
        )
        if problem is not None:
            raise problem
        part = Part(step=step, shard=self.shard, rank=self.rank, holders=self.holders, files=report.entries)
        meeting.leave(part)
        log.warning("elastic-fit: rank %d saved its shard of the state after step %d", self.rank, step)
        worker = session.current()
        if worker is not None:
            worker.ledger.write("rescue_part", step=step, rank=self.rank, shard=self.shard, shards=len(self.holders))


def holders_of(layouts: Iterable[Layout], world_size: int) -> tuple[tuple[int, ...], ...]:
    """Which ranks hold the same shards, lowest first.

    Two ranks do if they have the same place along every dimension, of every mesh, that divides a tensor. No ranks at
    all where there is no mesh, or one leaves some of them out: what these hold is not known then.
    """
    shards: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    places = [_places(layout) for layout in layouts]
    if not places or any(set(place) != set(range(world_size)) for place in places):
        return ()
    for rank in range(world_size):
        shards.setdefault(tuple(place[rank] for place in places), []).append(rank)
    return tuple(tuple(ranks) for ranks in shards.values())


def _places(layout: Layout) -> dict[int, tuple[int, ...]]:
    """Where each rank is, along the dimensions that divide a tensor."""
    return {
        int(rank): tuple(place for place, is_counted in zip(where, layout.divides, strict=True) if is_counted)
        for where, rank in np.ndenumerate(layout.ranks)
    }


def agree(trainer: pl.Trainer, generation: int) -> Replicas | None:
    """How the ranks will meet when one of them dies; None where a shard has no replica.

    To be called on all ranks when the model is set up: collective where there are replicas.
    """
    if trainer.world_size == 1 or not _sharded.captures_own_shards(trainer.strategy):
        return None
    layouts = _sharded.layouts(trainer.lightning_module)
    holders = holders_of(layouts, trainer.world_size)
    if not holders or min(len(ranks) for ranks in holders) < 2:
        return None
    groups = {id(group): group for layout in layouts for group in layout.groups}
    # A device that may be behind its process is not rescued, so that nothing need be paid for it.
    is_in_step = trainer.strategy.root_device.type == "cpu"
    return Replicas(
        rank=trainer.global_rank,
        holders=holders,
        token=gather(new_token(generation))[0],
        groups=tuple(groups.values()) if is_in_step else (),
    )


def _put_together(staged: Staged, parts: Mapping[int, Part], rest: Mapping[str, Any], facts: Facts) -> int:
    """Make one checkpoint of the parts, as the strategy would have written it, and commit it; returns its bytes."""
    with staged:
        files = {entry.path: entry for _, part in sorted(parts.items()) for entry in part.files}
        indexes = [_sharded.read_index(staged.path / path) for path in files if path.endswith(_sharded.METADATA)]
        with staged.open_part(_sharded.METADATA) as file:
            pickle.dump(_sharded.merge(indexes), file)
        with staged.open_part(_sharded.REST) as file:
            torch.save(rest, file)  # type: ignore[arg-type]
        data = [entry for path, entry in files.items() if not path.endswith(_sharded.METADATA)]
        wanted = {_sharded.METADATA, _sharded.REST, *(entry.path for entry in data)}
        for path in staged.path.iterdir():
            if path.name not in wanted:  # records, and what those have left who died over their part
                remove_tree(path, Disk())
        return staged.commit(facts, parts=data).manifest.total_bytes
