"""Survivors of a job whose shards have replicas (HSDP): each saves its own shard, and depends on nobody.

A *replica group* is ranks that together hold each shard once; ranks that hold the same shard, one in each group, are
equal after every optimizer step. When a rank dies, each survivor leaves its shard in a folder that is that step's:
those that hold the same one in turn, and only where it isn't there yet. Whoever finds all shards there puts them
together and commits, and the next one does if it dies over that. So it doesn't matter who survives, as long as somebody
does for every shard, at the same step. Survivors that are a step apart leave theirs in different folders, and the
newest step that is whole wins.

So that survivors of one group never are, its ranks take each optimizer step together or not at all.

Nobody knows who is alive, nor has to: a member that dies over its part keeps nobody waiting, and leaves its place to
the next that holds the same shard.
"""

from __future__ import annotations

import logging
import pickle
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist

from elastic_fit.callbacks import _sharded, session
from elastic_fit.callbacks._sharded import Layout
from elastic_fit.callbacks.collective import gather
from elastic_fit.callbacks.shards import write_part
from elastic_fit.supervisor.store import CheckpointStore, Facts, SaveFailed
from elastic_fit.supervisor.store.parts import Left, Meeting, Part, missing
from elastic_fit.supervisor.store.staging import twice_if_it_may_pass

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

    def save(self, checkpoint: Mapping[str, Any], store: CheckpointStore, name: str, facts: Facts) -> int | None:
        """Leave this rank's shard of a captured state, unless it is there already, or nothing would come of it: NaN.

        Returns the checkpoint's bytes if this rank has found all shards and has committed it. What may pass (an I/O
        error) is met once with new files. Raises OSError, StorageError or RuntimeError where the disk refuses for good.
        """
        if facts.finite is False:
            return None
        meeting = Meeting(store, name, self.token)
        shards, rest = _sharded.divide(checkpoint)
        twice_if_it_may_pass(lambda: self._leave(shards, meeting, facts.step))
        # So that whoever is the last to leave its shard isn't the only one who finds them all.
        meeting.wait_for_writers()
        parts, size = meeting.parts(), None
        if lacking := missing(self.holders, parts):
            log.warning("elastic-fit: shards of step %d that nobody has saved yet: %s", facts.step, lacking)
        else:
            size = twice_if_it_may_pass(lambda: _put_together(meeting, parts, rest, facts))
        # Whoever comes late has left a part that nobody will need, and sees by now that there is a checkpoint.
        if meeting.is_over():
            meeting.clear()
        return size

    def _leave(self, shards: dict[str, Any], meeting: Meeting, step: int) -> None:
        """Write this rank's shard, if it is wanted."""
        with meeting.stage(self.shard) as staged:
            if staged is None:
                return
            report, problem = write_part(staged, lambda path: _sharded.write_shards(shards, path, self.rank), self.rank)
            if problem is not None:
                refusal = report.refusals.get(self.rank)
                raise problem if refusal is None else SaveFailed(staged.target, refusal) from problem
            part = Part(step=step, shard=self.shard, rank=self.rank, holders=self.holders, files=report.entries)
            meeting.leave(staged, part)
        log.warning("elastic-fit: rank %d saved its shard of the state after step %d", self.rank, step)
        worker = session.current()
        if worker is not None:
            told = {"step": step, "rank": self.rank, "shard": self.shard, "shards": len(self.holders)}
            worker.ledger.write("rescue_part", **told)


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


def agree(trainer: pl.Trainer) -> Replicas | None:
    """How the ranks will meet when one of them dies; None where a shard has no replica, or ranks see that differently.

    To be called on all ranks when the model is set up: collective where the strategy is one whose shards are saved.
    """
    if trainer.world_size == 1 or not _sharded.captures_own_shards(trainer.strategy):
        return None
    layouts = _sharded.layouts(trainer.lightning_module)
    mine = holders_of(layouts, trainer.world_size)
    holders, tokens = zip(*gather((mine, secrets.token_hex(4))), strict=True)
    if not mine or min(len(ranks) for ranks in mine) < 2 or set(holders) != {mine}:
        return None
    groups = {id(group): group for layout in layouts for group in layout.groups}
    return Replicas(
        rank=trainer.global_rank,
        holders=mine,
        token=tokens[0],
        groups=tuple(groups.values()),
    )


def _put_together(meeting: Meeting, parts: Mapping[int, Left], rest: Mapping[str, Any], facts: Facts) -> int | None:
    """Commit the parts as one checkpoint such as the strategy would have written, and return its bytes.

    None where another process is at it, or there is one by now.
    """
    assert {left.part.step for left in parts.values()} == {facts.step}
    files = {path: entry for _, left in sorted(parts.items()) for path, entry in left.files.items()}
    indexes = [path for path in files if path.name.endswith(_sharded.METADATA)]
    shards = {path: entry for path, entry in files.items() if path not in indexes}
    with meeting.claimed() as is_mine, meeting.join() as staged:
        if not is_mine or meeting.is_over():
            return None
        staged.mkdir()
        with staged.open_part(_sharded.METADATA) as file:
            pickle.dump(_sharded.merge([_sharded.read_index(path) for path in indexes]), file)
        with staged.open_part(_sharded.REST) as file:
            torch.save(rest, file)  # type: ignore[arg-type]
        shared = meeting.add(shards, staged)
        size = staged.commit(facts, parts=shared).manifest.total_bytes
        # What has two names is believed by nobody: one of them has to go.
        meeting.clear()
        return size
