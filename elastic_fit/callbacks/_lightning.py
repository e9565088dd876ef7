"""Adapter to Lightning: the only module of this room that touches its private names, and torch's.

Holds for Lightning 2.6 and torch 2.10 to 2.13; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed import Store, distributed_c10d
from torch.distributed.checkpoint.filesystem import FileSystem


def is_boundary(trainer: pl.Trainer) -> bool:
    """Whether the batch that just ended completed an optimizer step (no gradients are half accumulated)."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Whether the batch that just ended was the epoch's last."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def validates_next(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the epoch's last batch."""
    every = trainer.check_val_every_n_epoch
    is_due = every is None or (trainer.current_epoch + 1) % every == 0
    return trainer.enable_validation and sum(_as_list(trainer.num_val_batches)) > 0 and is_due


def _as_list(numbers: Any) -> list[float]:
    return list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]


def capture(trainer: pl.Trainer, *, weights_only: bool = False) -> dict[str, Any]:
    """Everything that Lightning puts into a checkpoint. Collective where the strategy is sharded."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


def is_tuning(trainer: pl.Trainer) -> bool:
    """Whether this ``fit`` is a search for a learning rate or a batch size, and ends before it trains."""
    finders = (LearningRateFinder, BatchSizeFinder)
    return any(isinstance(callback, finders) and callback._early_exit for callback in callbacks_of(trainer))


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All callbacks of a trainer, in the order in which they are called."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def is_rehearsal(trainer: pl.Trainer) -> bool:
    """Whether this is ``fast_dev_run``, which leaves nothing behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def writes_plain_files(strategy: Strategy) -> bool:
    """Whether rank 0 alone writes checkpoints, each one file by ``torch.save``."""
    own = type(strategy).save_checkpoint is Strategy.save_checkpoint
    return own and type(strategy.checkpoint_io) is TorchCheckpointIO


def accept_any_world() -> None:
    """Let Lightning take the world as it is: nodes may contribute different numbers of workers."""

    def validate_settings(self: TorchElasticEnvironment, num_devices: int, num_nodes: int) -> None:
        """Whatever the agent has formed is right."""

    TorchElasticEnvironment.validate_settings = validate_settings  # type: ignore[method-assign]


@contextlib.contextmanager
def shards_written_to(open_shard: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Send the files that torch.distributed.checkpoint writes to `open_shard` (given their path) meanwhile."""
    before = FileSystem.create_stream

    @contextlib.contextmanager
    def create_stream(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with before(self, path, mode) as stream:
                yield stream
            return
        with open_shard(str(path)) as stream:
            yield stream

    FileSystem.create_stream = create_stream  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystem.create_stream = before  # type: ignore[method-assign]


def job_store() -> Store | None:
    """The default process group's store; None where there is no process group."""
    return distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None


def is_replicated(trainer: pl.Trainer) -> bool:
    """Whether every rank holds the whole state."""
    return trainer.world_size > 1 and type(trainer.strategy) is DDPStrategy


def capture_between_steps(trainer: pl.Trainer) -> dict[str, Any]:
    """What `capture` would have given at the last boundary, while a later batch is in flight.

    The loop's counters are put back to what they were in ``on_train_batch_end`` of the last completed batch, which is
    the state that Lightning's restart logic expects; the batch in flight will be taken again.
    """
    checkpoint = capture(trainer)
    epoch_loop = trainer.fit_loop.epoch_loop
    progress: Any = epoch_loop.batch_progress
    is_in_flight = progress.current.ready > progress.current.processed
    if is_in_flight and progress.current.completed > 0:
        state = checkpoint["loops"]["fit_loop"]
        for counts in (state["epoch_loop.batch_progress"]["total"], state["epoch_loop.batch_progress"]["current"]):
            done = counts["completed"]
            counts.update(ready=done, started=done, processed=done, completed=done - 1)
        state["epoch_loop.batch_progress"]["is_last_batch"] = False
        state["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    return checkpoint


def resume_from(trainer: pl.Trainer, path: str) -> None:
    """Have this ``fit`` restore `path`, whatever it was called with. To be called from a ``setup`` hook."""
    connector = trainer._checkpoint_connector
    restore = connector._restore_modules_and_callbacks

    def restore_ours(_: Any = None, weights_only: bool | None = None) -> None:
        connector._restore_modules_and_callbacks = restore  # type: ignore[method-assign]
        restore(path, weights_only)

    connector._restore_modules_and_callbacks = restore_ours  # type: ignore[method-assign, assignment]
