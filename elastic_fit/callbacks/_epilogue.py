"""Adapter to what Lightning's loops do between two training batches: validate, and deal with an epoch's end.

Holds for Lightning 2.6; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer import call
from torch.utils._pytree import tree_map

from elastic_fit.callbacks import _buffers, _lightning


def is_to_come(trainer: pl.Trainer) -> bool:
    """Whether a step's batch is done, and a validation or the epoch's end follows it that hasn't begun."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    is_done = trainer.training and progress.ready == progress.processed > 0 and _lightning.is_boundary(trainer)
    return is_done and _lightning.is_epoch_under_way(trainer) and _lightning.is_followed_by_more(trainer)


def call_before(trainer: pl.Trainer, act: Callable[[], None]) -> None:
    """Have the loop call `act` when a batch and its hooks are done, and its row is logged."""
    loop = trainer.fit_loop.epoch_loop
    go_on = functools.partial(type(loop).on_advance_end, loop)

    def on_advance_end(data_fetcher: Any) -> None:
        validates = loop._should_check_val_fx(data_fetcher)  # by a clock, perhaps: asked once
        vars(loop)["_should_check_val_fx"] = lambda _: validates
        try:
            act()
            go_on(data_fetcher)
        finally:
            vars(loop).pop("_should_check_val_fx")

    vars(loop)["on_advance_end"] = on_advance_end


def leave_alone(trainer: pl.Trainer) -> None:
    """Undo whatever was done here to the loops."""
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
        for name in ("run", "on_run_start", "advance", "on_advance_end", "_should_check_val_fx"):
            vars(loop).pop(name, None)


def start_anyway(trainer: pl.Trainer, *, is_batch_done: bool = False) -> None:
    """Have this ``fit`` start also where all epochs or steps are done, and do what is left to be done after them.

    Lightning calls no hook then, also not that of the training's end. `is_batch_done`: the hooks of the last batch of
    the checkpoint count as called, although it was saved in one of them.
    """
    loop = trainer.fit_loop
    batches = loop.epoch_loop
    if "run" in vars(loop) and not is_batch_done:
        return  # it will, and who has asked for it may know more

    def run() -> None:
        vars(loop).pop("run")
        if is_batch_done:
            progress: Any = batches.batch_progress
            for counts in (progress.total, progress.current):
                counts.completed = counts.processed
        loop.setup_data()
        if trainer.limit_train_batches == 0 or loop.max_batches == 0:
            return loop.run()
        limits = loop.max_epochs, batches.max_steps
        loop.max_epochs = batches.max_steps = -1

        def on_run_start() -> None:
            vars(loop).pop("on_run_start")
            loop.max_epochs, batches.max_steps = limits
            loop.on_run_start()
            if "advance" in vars(batches):
                batches.max_steps = -1  # until what is left of the epoch has begun

        vars(loop)["on_run_start"] = on_run_start
        try:
            return loop.run()
        finally:
            if vars(loop).pop("on_run_start", None) is not None:  # it didn't start after all
                loop.max_epochs, batches.max_steps = limits

    vars(loop)["run"] = run


def begin_with_it(trainer: pl.Trainer, *, validates: bool, should_stop: bool) -> None:
    """Have the epoch that is restarted begin with what follows the batch that is behind it.

    To be called when a training starts that was to `start_anyway`. Lightning's own restart would leave out the
    validation, and draw another batch where the epoch has none left.
    """
    loop = trainer.fit_loop.epoch_loop
    last_step = loop.max_steps
    should_stop = should_stop or trainer.should_stop
    trainer.should_stop = False  # until it has begun

    def advance(_: Any) -> None:
        vars(loop).pop("advance")
        loop.max_steps = last_step
        trainer.should_stop = should_stop
        vars(loop)["_should_check_val_fx"] = lambda _: validates

    loop.val_loop.restarting = False
    loop.val_loop._has_run = False  # else there would be nothing left to do
    vars(loop)["advance"] = advance


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallState:
    """A copy of all that a validation and an epoch's end change, as a rule: not of the parameters and their moments."""

    captured: Mapping[str, Any]
    """Parts of a checkpoint, by their names there."""
    groups: Sequence[Sequence[Mapping[str, Any]]]
    """The settings of each optimizer's groups of parameters: learning rates above all."""
    buffers: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, trainer: pl.Trainer) -> SmallState:
        """What there is now; calls the ``state_dict`` of every callback."""
        connector = trainer._checkpoint_connector
        captured = {
            "epoch": trainer.current_epoch,
            "loops": connector._get_loops_state_dict(),
            "callbacks": call._call_callbacks_state_dict(trainer),
            "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }
        _lightning.roll_back_to_boundary(trainer, captured)
        groups = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        places = _buffers.persistent_buffers(trainer)
        buffers = {name: buffers[own] for name, (buffers, own) in places.items()}
        return cls(captured=_copy(captured), groups=_copy(groups), buffers=_copy(buffers))

    def put_into(self, checkpoint: dict[str, Any], *, but: Sequence[str]) -> None:
        """Have a captured state say what this one does, but for the callbacks of these keys.

        Groups of parameters that have come since are left out.
        """
        as_it_is = {key: state for key, state in checkpoint["callbacks"].items() if key in but}
        checkpoint.update(_copy(self.captured))
        checkpoint["callbacks"].update(as_it_is)
        for state, groups in zip(checkpoint.get("optimizer_states", []), self.groups, strict=False):
            if "param_groups" not in state:
                continue  # another rank has gathered it
            state["param_groups"] = [
                {**now, **then} for now, then in zip(state["param_groups"], _copy(groups), strict=False)
            ]
        model = checkpoint.get("current_model_state", checkpoint["state_dict"])
        model.update({name: value for name, value in self.buffers.items() if name in model})


def _copy(thing: Any) -> Any:
    return tree_map(lambda one: one.detach().clone() if isinstance(one, torch.Tensor) else copy.deepcopy(one), thing)


class Swaps:
    """Knows whether WeightAveraging has its averaged weights in the model, and the model's own in their place."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._are_swapped = False
        for callback in _lightning.callbacks_of(trainer):
            if isinstance(callback, WeightAveraging):
                vars(callback)["_swap_models"] = functools.partial(self._swap, type(callback)._swap_models, callback)

    def _swap(self, swap: Callable[..., None], callback: WeightAveraging, pl_module: pl.LightningModule) -> None:
        swap(callback, pl_module)
        self._are_swapped = not self._are_swapped

    def undo_in(self, checkpoint: dict[str, Any]) -> None:
        """Change them back in a captured state."""
        if self._are_swapped and "current_model_state" in checkpoint:
            averaged, checkpoint["state_dict"] = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["current_model_state"] = averaged
