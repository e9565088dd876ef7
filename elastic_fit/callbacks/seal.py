"""Sealed saves: whatever a strategy writes below a folder becomes a committed checkpoint with a manifest.

The strategy's ``save_checkpoint`` is what gets wrapped, not its CheckpointIO, which sharded strategies bypass. What a
save consists of is captured by Lightning before; here it is only persisted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from elastic_fit.callbacks import _lightning, session
from elastic_fit.callbacks.collective import gather, is_saving_alone
from elastic_fit.callbacks.position import DataPosition
from elastic_fit.callbacks.shards import write_together
from elastic_fit.supervisor.board import Phase, Word
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store import (
    CheckpointStore,
    Facts,
    FencedOff,
    is_remote,
    open_store,
)
from elastic_fit.supervisor.store.staging import twice_if_it_may_pass

log = logging.getLogger("elastic_fit")

_WRAPPED = "_elastic_fit_seals"


@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """Why a checkpoint is written."""

    kind: str = "manual"
    reason: str = ""
    extra: Mapping[str, Any] | None = None


class Seals:
    """The sealed folders of one trainer's strategy.

    Saves outside of them go the strategy's own way. A save that fails is told, remembered and does not end the
    training: the checkpoints before it are untouched, also by those who believe that it has taken their place.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._stores: dict[str, CheckpointStore] = {}
        strategy = trainer.strategy
        self._save = strategy.save_checkpoint
        self._remove = strategy.remove_checkpoint
        self.purpose = Purpose()
        self.finite_check = True
        self.last_failure: str | None = None
        self.is_last_of_use = True
        """Whether a training could go on from the newest save, as far as this rank knows: it is whole and finite."""
        self._put_off: dict[str, None] = {}
        self._began_s: float | None = None
        strategy.save_checkpoint = self.save  # type: ignore[method-assign]
        strategy.remove_checkpoint = self.remove  # type: ignore[method-assign]
        setattr(strategy, _WRAPPED, self)

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Seals:
        """The seals of this trainer's strategy, put on now if there are none."""
        found = getattr(trainer.strategy, _WRAPPED, None)
        return found if isinstance(found, Seals) else cls(trainer)

    def add(self, root: str | Path, store: CheckpointStore) -> None:
        """Seal everything that is saved below `root`, a folder or a URL."""
        self._stores[_absolute(root)] = store

    def store_of(self, path: str | Path) -> tuple[CheckpointStore, str] | None:
        """The store that a path belongs to and its name there, or None."""
        absolute = _absolute(path)
        for root, store in self._stores.items():
            if absolute.startswith(root + "/"):
                return store, absolute[len(root) + 1 :]
        return None

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """What is saved meanwhile has begun now, with the capture of the state; others' saves with their writing."""
        self._began_s = time.monotonic()
        try:
            yield
        finally:
            self._began_s = None

    def save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """What ``strategy.save_checkpoint`` does now."""
        place = self.store_of(filepath)
        if place is None:
            self._save(checkpoint, filepath, storage_options=storage_options)
            return
        worker = session.current()
        phase = worker.board.phase if worker else None
        if worker is not None:
            worker.board.enter(Phase.SAVING)
        try:
            self._save_sealed(checkpoint, *place, storage_options)
        finally:
            if worker is not None and phase is not None:
                worker.board.enter(phase)

    def _save_sealed(
        self, checkpoint: dict[str, Any], store: CheckpointStore, name: str, storage_options: Any | None
    ) -> None:
        began = self._began_s or time.monotonic()
        trainer = self._trainer
        facts = facts_of(trainer, self.purpose, checkpoint, store.branch)
        is_plain = _lightning.writes_plain_files(trainer.strategy)
        if is_plain and not trainer.is_global_zero:
            return
        if self.finite_check:
            mine = is_finite(checkpoint)
            facts = replace(facts, finite=mine if is_plain else all(gather(mine)))
        if is_plain:
            self._told(store, name, facts, began, lambda: persist(checkpoint, store, name, facts))
        else:
            self._told(
                store, name, facts, began, lambda: self._write_together(checkpoint, store, name, facts, storage_options)
            )

    def _write_together(
        self, checkpoint: dict[str, Any], store: CheckpointStore, name: str, facts: Facts, storage_options: Any | None
    ) -> int:
        def write(path: str) -> None:
            # A copy: strategies take out what they write as shards, and it may have to be written again.
            self._save(dict(checkpoint), path, storage_options=storage_options)

        return write_together(self._trainer, write, store, name, facts)

    def _told(self, store: CheckpointStore, name: str, facts: Facts, began: float, write: Callable[[], int]) -> None:
        """Run a save and tell the ledger and the log what came of it."""
        worker = session.current()
        path = str(store.root / name)
        try:
            size = write()
        except FencedOff:
            raise
        except StorageError as error:
            self.last_failure, self.is_last_of_use = error.message, False
            log.error("%s (%s)", error.message, error.hint)
            if worker is not None and self._trainer.is_global_zero:
                worker.ledger.write("save_failed", path=path, step=facts.step, error=error.message)
            return
        self.last_failure = None
        self.is_last_of_use = facts.finite is not False and not facts.extra.get("weights_only")
        if facts.finite is False and self._trainer.is_global_zero:
            log.error("elastic-fit: %s holds NaN or Inf: it is kept to be looked at, and nothing goes on from it", path)
        seconds = time.monotonic() - began
        if worker is not None:
            if self.is_last_of_use and Path(store.root) == worker.folder.fit(worker.fits):
                worker.board[Word.SAVED_STEP] = facts.step
                worker.has_saved = True
            if self._trainer.is_global_zero:
                worker.ledger.write(
                    "save",
                    path=path,
                    step=facts.step,
                    kind=facts.kind,
                    bytes=size,
                    seconds=round(seconds, 4),
                    stall_s=round(seconds, 4),
                    **({"finite": False} if facts.finite is False else {}),
                )
        self._put_off.pop(path, None)
        put_off, self._put_off = self._put_off, {}
        for filepath in put_off:
            self.remove(filepath)

    def remove(self, filepath: Any) -> None:
        """What ``strategy.remove_checkpoint`` does now: manifest first, then data.

        Put off until another save has succeeded, where the newest one has failed or nothing else would be valid.
        """
        place = self.store_of(filepath)
        if place is None:
            self._remove(filepath)
        elif self._trainer.is_global_zero:
            store, name = place
            with self.telling():
                if self.last_failure is None and not is_last_valid(store, name):
                    store.remove(name)
                else:
                    self._put_off[str(store.root / name)] = None

    def link(self, filepath: str, linkpath: str) -> None:
        """Point a symlink at a checkpoint beside it, by rename."""
        folder, name = os.path.split(os.path.abspath(linkpath))
        place = self.store_of(linkpath)
        store = place[0] if place is not None and str(place[0].root) == folder else CheckpointStore(folder)
        with self.telling():
            store.link_last(os.path.relpath(filepath, folder), name)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """What fails around a checkpoint that is committed is told, and doesn't end the training."""
        try:
            yield
        except FencedOff:
            raise
        except StorageError as error:
            log.error("elastic-fit: %s", error.message)
            worker = session.current()
            if worker is not None:
                worker.ledger.write("cleanup_failed", error=error.message)


def is_last_valid(store: CheckpointStore, name: str) -> bool:
    """Whether that checkpoint is the only one in its folder that a run could go on from."""
    path = store.root / name
    return [one.path.name for one in open_store(path.parent).valid()] == [path.name]


def _absolute(place: str | Path) -> str:
    return str(place).rstrip("/") if is_remote(place) else os.path.abspath(str(place).removeprefix("file://"))


def persist(checkpoint: Mapping[str, Any], store: CheckpointStore, name: str, facts: Facts) -> int:
    """Write a captured state as one sealed file, from any process; returns its bytes.

    What may pass (an I/O error) is met once with new files. Raises SaveFailed where the disk refuses for good,
    FencedOff where a newer generation has taken the run.
    """
    return twice_if_it_may_pass(lambda: _write(checkpoint, store, name, facts))


def _write(checkpoint: Mapping[str, Any], store: CheckpointStore, name: str, facts: Facts) -> int:
    with store.stage(name) as staged:
        with staged.open() as file:
            torch.save(checkpoint, file)  # type: ignore[arg-type]
        return staged.commit(facts).manifest.total_bytes


def why_unsafe(path: Path) -> str | None:
    """Why a checkpoint can't be loaded with ``weights_only=True``, which is how it will be resumed from; or None.

    The tensors are not read. Of a folder of shards, the part that holds the hyperparameters is looked at.
    """
    file = path / "meta.pt" if path.is_dir() else path
    try:
        torch.load(file, weights_only=True, mmap=True, map_location="meta")
    except pickle.UnpicklingError as error:
        found = re.search(r"(GLOBAL|global) (\S+)", str(error))
        return found[2].strip("`") if found else str(error).splitlines()[0]
    except (OSError, RuntimeError):
        return None  # another look, at the resume, will say what is wrong with it
    return None


def is_finite(checkpoint: Mapping[str, Any]) -> bool:
    """Whether no parameter and no optimizer state holds NaN or Inf.

    NaN and Inf survive a sum, the quickest pass there is over a tensor. Only where a sum isn't finite, which large
    numbers can cause too, every element is looked at.
    """
    tensors = [*_floating(checkpoint.get("state_dict")), *_floating(checkpoint.get("optimizer_states"))]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    with torch.no_grad():
        return all(_are_finite(those) for those in by_device.values())


def _are_finite(tensors: list[torch.Tensor]) -> bool:
    sums = torch.stack([_wide(tensor).sum().isfinite() for tensor in tensors])
    if bool(sums.all()):  # one wait for the device
        return True
    doubtful = [tensor for tensor, finite in zip(tensors, sums.tolist(), strict=True) if not finite]
    return all(bool(_wide(tensor).isfinite().all()) for tensor in doubtful)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Torch neither sums nor tests floats of one byte."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def _floating(thing: Any) -> Iterable[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        for part in _own_parts(thing):
            local = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
            if local.is_floating_point() and local.numel():
                yield local.detach()
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from _floating(value)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from _floating(value)


def _own_parts(tensor: Any) -> Iterable[torch.Tensor]:
    """What of a tensor is on this rank: a DTensor's part, the shards of FSDP's older ShardedTensor, or all of it."""
    if hasattr(tensor, "local_shards"):
        return [shard.tensor for shard in tensor.local_shards()]
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor]


def facts_of(trainer: pl.Trainer, purpose: Purpose, checkpoint: Mapping[str, Any], branch: int) -> Facts:
    """What the manifest of a captured state says that is saved to that branch."""
    worker = session.current()
    extra = dict(purpose.extra or {})
    metrics = _lightning.callback_metrics(trainer, ask_others=not is_saving_alone())
    if "optimizer_states" not in checkpoint:
        extra["weights_only"] = True
    position = next((one for one in _lightning.callbacks_of(trainer) if isinstance(one, DataPosition)), None)
    if position is not None and (batch := position.global_batch()) is not None:
        extra["global_batch"] = batch
        if position.global_batch_change is not None:
            extra["global_batch_change"] = dict(position.global_batch_change)
    if rates := _learning_rates(checkpoint):
        extra["lr"] = rates
    return Facts(
        step=trainer.global_step,
        epoch=checkpoint["epoch"],
        samples=position.samples() if position is not None else None,
        world_size=trainer.world_size,
        strategy=type(trainer.strategy).__name__,
        kind=purpose.kind,
        reason=purpose.reason,
        run_id=worker.context.run_id if worker else "",
        generation=worker.context.generation if worker else 0,
        branch=branch,
        metrics={name: float(value) for name, value in metrics.items()},
        versions={"torch": torch.__version__, "lightning": pl.__version__},
        extra=extra,
    )


def _learning_rates(checkpoint: Mapping[str, Any]) -> list[float]:
    """Of every group of parameters of every optimizer, as captured."""
    groups = [group for state in checkpoint.get("optimizer_states", []) for group in state.get("param_groups", [])]
    return [float(group["lr"]) for group in groups if "lr" in group]
