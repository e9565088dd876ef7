"""Adapter to Lightning: with the other modules named ``_*`` the only one here that touches its private names.

Holds for Lightning 2.6 and torch 2.11 to 2.13; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import Store, distributed_c10d
from torch.distributed.checkpoint.filesystem import FileSystem


def is_boundary(trainer: pl.Trainer) -> bool:
    """Whether the batch that just ended completed an optimizer step (no gradients are half accumulated)."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def is_epoch_ending(trainer: pl.Trainer) -> bool:
    """Whether the batch that just ended was the last of its epoch: of all, or because the training ends with it."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early))


def is_validation_next(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the batch that just ended."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    validates = fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)
    return bool(validates)


def is_followed_by_more(trainer: pl.Trainer) -> bool:
    """Whether a validation, or the end of the epoch, follows the batch that just ended before another one begins."""
    return is_validation_next(trainer) or is_epoch_ending(trainer)


def is_epoch_whole(trainer: pl.Trainer) -> bool:
    """Whether the batch that just ended was the last of all batches; an epoch that is cut short steps no schedulers."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_at_epoch_end(trainer: pl.Trainer) -> bool:
    """Whether all batches of the epoch under way are done and its end is being dealt with."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return bool(progress.processed == progress.started and progress.completed == progress.processed - 1)


def is_at_step_end(trainer: pl.Trainer) -> bool:
    """Whether the hooks of a batch that completed an optimizer step are being called."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed == progress.completed + 1) and is_boundary(trainer)


def is_scheduler_under_way(trainer: pl.Trainer) -> bool:
    """Whether a scheduler is just being stepped, as part of the batch that is done."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    schedulers = trainer.fit_loop.epoch_loop.scheduler_progress.current
    return bool(progress.processed != progress.completed and schedulers.ready != schedulers.completed)


def is_epoch_under_way(trainer: pl.Trainer) -> bool:
    """Whether an epoch has begun whose end hasn't been dealt with."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return bool(progress.processed < progress.started)


def is_between_steps(trainer: pl.Trainer) -> bool:
    """Whether no batch is in flight and no gradients are half accumulated."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(current.ready == current.processed == batches_at_boundary(trainer) or current.ready == 0)


def is_mid_epoch(trainer: pl.Trainer) -> bool:
    """Whether this ``fit`` goes on in the middle of an epoch."""
    return trainer.fit_loop.restarted_mid_epoch and not is_epoch_over(trainer, batches_at_boundary(trainer))


def end_restart(trainer: pl.Trainer) -> None:
    """The epoch that was restarted has trained on; what is left of it is as in any other."""
    trainer.fit_loop._restarting = False


def take_epoch_as_over(trainer: pl.Trainer) -> None:
    """Go on after an epoch whose end was being dealt with in the checkpoint that this ``fit`` goes on from.

    Lightning does so itself, but where ``max_steps`` is set: there it would deal with that end once more.
    """
    loop = trainer.fit_loop
    for counts in (loop.epoch_progress.total, loop.epoch_progress.current):
        counts.completed = counts.processed  # type: ignore[attr-defined]
    for one in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        one._restarting = False
        one.reset_restart_stage()


def capture(trainer: pl.Trainer, *, weights_only: bool = False) -> dict[str, Any]:
    """Everything that Lightning puts into a checkpoint. Collective where the strategy gathers its shards for it."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


def is_tuning(trainer: pl.Trainer) -> bool:
    """Whether this ``fit`` is a search for a learning rate or a batch size, and ends before it trains."""
    finders = (LearningRateFinder, BatchSizeFinder)
    return any(isinstance(callback, finders) and callback._early_exit for callback in callbacks_of(trainer))


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All callbacks of a trainer, in the order in which they are called."""
    return list(callbacks_in(trainer))


def callbacks_in(trainer: pl.Trainer) -> list[pl.Callback]:
    """The trainer's own list of them."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


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
def shards_written_to(folder: str, open_shard: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Send the files that a strategy writes below `folder` to `open_shard` (given their path) meanwhile.

    Those are torch.distributed.checkpoint's, and what Lightning puts beside them with ``torch.save``.
    """
    before, save = FileSystem.create_stream, torch.save

    @contextlib.contextmanager
    def create_stream(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        with open_shard(str(path)) if mode == "wb" else before(self, path, mode) as stream:
            yield stream

    def save_streamed(obj: object, f: Any, *args: Any, **options: Any) -> None:
        if isinstance(f, (str, os.PathLike)) and os.fspath(f).startswith(folder + os.sep):
            with open_shard(os.fspath(f)) as stream:
                save(obj, stream, *args, **options)
        else:
            save(obj, f, *args, **options)

    FileSystem.create_stream = create_stream  # type: ignore[method-assign]
    torch.save = save_streamed
    try:
        yield
    finally:
        FileSystem.create_stream = before  # type: ignore[method-assign]
        torch.save = save


def job_store() -> Store | None:
    """The default process group's store; None where there is no process group."""
    return distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None


def own_connection() -> Store | None:
    """Another connection to the process group's store, for a thread of its own; None where there is no group."""
    store = job_store()
    return store.clone() if store is not None else None  # type: ignore[attr-defined]


def is_replicated(trainer: pl.Trainer) -> bool:
    """Whether every rank holds the whole state."""
    return trainer.world_size > 1 and type(trainer.strategy) is DDPStrategy


def batches_at_boundary(trainer: pl.Trainer) -> int:
    """Batches of this epoch, on this rank, whose optimizer step is done: those of half an accumulation don't count."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    done = int(current.processed)
    return done if is_epoch_over(trainer, done) else done - done % trainer.accumulate_grad_batches


def batch_under_way(trainer: pl.Trainer) -> int:
    """The number of the epoch's batch that is being trained on, from 0."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(current.ready) - 1


def is_epoch_over(trainer: pl.Trainer, batches: int) -> bool:
    """Whether that many batches are all of the epoch."""
    return batches > 0 and batches >= trainer.fit_loop.max_batches


def is_iterator_next(trainer: pl.Trainer) -> bool:
    """Whether the epoch that begins makes its iterator anew; that of a ``fit``'s first one is made before it begins."""
    fit = trainer.fit_loop
    return trainer.current_epoch > 0 and not fit.is_resuming and not fit.epoch_loop.restarting


def is_restored_between_epochs(trainer: pl.Trainer) -> bool:
    """Whether no batch of an epoch is done, and others before it are, in what was restored. For ``on_train_start``."""
    done = batches_at_boundary(trainer)
    return is_epoch_over(trainer, done) or (done == 0 and trainer.current_epoch > 0)


def draw_nothing_for_validations_skipped(trainer: pl.Trainer) -> None:
    """Where no batch of the epoch is done, Lightning takes a validation within it for done, and makes its iterator.

    For ``on_train_start``. (After a batch the number that this draws stands for the one that the validation had drawn.)
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    skip = loop.increment_progress_to_evaluation_end
    if batches_at_boundary(trainer):
        return

    def skip_undrawn() -> None:
        loop.increment_progress_to_evaluation_end = skip  # type: ignore[method-assign]
        with torch.random.fork_rng(devices=[]):
            skip()

    loop.increment_progress_to_evaluation_end = skip_undrawn  # type: ignore[method-assign]


def count_batches_anew(trainer: pl.Trainer, done: int) -> None:
    """Say that `done` batches of this epoch are behind us, where another number of ranks took others for the steps.

    What was restored is as of a step, whatever number of batches made one then.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    offset = done - int(progress.current.processed)
    for counts in (progress.total, progress.current):
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, max(0, getattr(counts, name) + offset))


def batches_in_all(trainer: pl.Trainer) -> int:
    """Batches that this rank has processed in the whole training, as far as their optimizer steps are done."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed - progress.current.processed) + batches_at_boundary(trainer)


def epoch_under_way(trainer: pl.Trainer) -> int:
    """The number that Lightning gives its samplers for the epoch under way."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def roll_back_to_boundary(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Put the loop's counters in a captured state back to the last optimizer step.

    What is in flight, or half accumulated, is in no parameter: its batches will be taken again. The counters become
    what they were in ``on_train_batch_end`` of the last batch that completed a step, the state that Lightning's
    restart logic expects; before the epoch's first step, what they are while its first batch is in flight.
    """
    if is_between_steps(trainer):
        return
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    boundary = batches_at_boundary(trainer)
    state = checkpoint["loops"]["fit_loop"]
    batch = state["epoch_loop.batch_progress"]
    undone = current.processed - boundary
    for counts in (batch["total"], batch["current"]):
        done = counts["processed"] - undone
        if boundary:
            counts.update(ready=done, started=done, processed=done, completed=done - 1)
        else:
            counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    batch["is_last_batch"] = False
    if boundary or trainer.accumulate_grad_batches == 1:
        # Lightning counts the step of the batch that it resumes at once more.
        state["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def decide_restore(trainer: pl.Trainer, decide: Callable[[Any], Any]) -> None:
    """Have this ``fit`` restore what `decide` makes of the path that it was called with. For a ``setup`` hook."""
    connector = trainer._checkpoint_connector
    restore = connector._restore_modules_and_callbacks

    def restore_ours(path: Any = None, weights_only: bool | None = None) -> None:
        connector._restore_modules_and_callbacks = restore  # type: ignore[method-assign]
        restore(decide(path), weights_only)

    connector._restore_modules_and_callbacks = restore_ours  # type: ignore[method-assign, assignment]


def has_hpc_checkpoint(trainer: pl.Trainer) -> bool:
    """Whether Lightning's own handling of SLURM has left a checkpoint, which ``fit(ckpt_path="hpc")`` insists on."""
    return trainer._checkpoint_connector._hpc_resume_path is not None


def requeues_by_itself(trainer: pl.Trainer) -> bool:
    """Whether Lightning handles SLURM's signals: without the launcher, in a SLURM job, unless the script says no."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


def take_signals(trainer: pl.Trainer) -> None:
    """Have Lightning neither handle SIGTERM nor broadcast before each batch whether one came, until given back."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def give_signals_back(trainer: pl.Trainer) -> None:
    """Undo `take_signals`."""
    vars(trainer._signal_connector).pop("register_signal_handlers", None)
    vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)


def synchronize(trainer: pl.Trainer) -> None:
    """Wait until the device has done what was queued."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)


def is_validation_under_way(trainer: pl.Trainer) -> bool:
    """Whether this moment is in the middle of one of ``fit``'s own validations (not of the sanity check)."""
    if trainer.state.fn != TrainerFn.FITTING or not trainer.validating or trainer.sanity_checking:
        return False
    hook = trainer.lightning_module._current_fx_name
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    # Within ``on_save_checkpoint`` the hook that saves is not known, but whether the last batch was counted is.
    is_past_batches = progress.is_last_batch and progress.current.completed == progress.current.ready > 0
    return not (hook == "on_validation_end" or (hook == "on_save_checkpoint" and is_past_batches))


def batches_half_accumulated(trainer: pl.Trainer) -> int:
    """Batches since the last optimizer step, whose gradients are in no parameter yet."""
    return trainer.fit_loop.epoch_loop.batch_idx + 1 - batches_at_boundary(trainer)


def batches_to_boundary(trainer: pl.Trainer) -> int:
    """Batches until the accumulation under way becomes a step, unless the epoch ends before."""
    return trainer.accumulate_grad_batches - batches_half_accumulated(trainer)


def callback_metrics(trainer: pl.Trainer, *, ask_others: bool) -> dict[str, Any]:
    """The metrics that callbacks see. Computing those under way is collective; otherwise the ones computed so far."""
    return dict(trainer.callback_metrics if ask_others else trainer._logger_connector._callback_metrics)


def call_around_step(trainer: pl.Trainer, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Have them called whenever an optimizer changes parameters.

    `before`: its gradients are there, and clipped. `after`: its step is done, and that of a scaler of the loss.
    """
    plugin = trainer.precision_plugin
    finish_gradients, step = plugin._after_closure, plugin.optimizer_step

    def finish_and_act(*args: Any, **kwargs: Any) -> None:
        finish_gradients(*args, **kwargs)
        before()

    def step_and_act(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        after()
        return result

    vars(plugin).update(_after_closure=finish_and_act, optimizer_step=step_and_act)


def batches_begun(trainer: pl.Trainer) -> int:
    """Training batches that were begun in the whole training, on this rank."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.ready)


def batches_done(trainer: pl.Trainer) -> int:
    """Training batches whose computation is done, in the whole training, on this rank."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed)
