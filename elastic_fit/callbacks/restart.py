"""What Lightning's own restart leaves out, so that a step or an epoch that was interrupted ends as one that was not."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging

from elastic_fit.callbacks import _epilogue, _lightning
from elastic_fit.callbacks.epilogue import Epilogue
from elastic_fit.callbacks.progress import show_place


class RestartedEpoch(pl.Callback):
    """Takes up what belongs to the epoch, not to the step.

    - In an epoch that was interrupted, ReduceLROnPlateau is stepped at its end as in any other, and stochastic weight
      averaging and the progress bar are prepared as at its start.
    - In a checkpoint of a step's or an epoch's end, the schedulers that look at a metric have not been stepped yet:
      Lightning does that after the save and never makes up for it. The metrics are those that `LoggedResults` has put
      back.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._restored: dict[str, Any] | None = None
        self._is_first_batch = False

    @property
    def state_key(self) -> str:
        """Constant."""
        return "elastic_fit.RestartedEpoch"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose metrics these are."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Which end is being dealt with."""
        trainer = self._trainer
        if trainer is None:
            return {}
        has_epilogue = any(isinstance(one, Epilogue) for one in _lightning.callbacks_of(trainer))
        is_to_come = has_epilogue and _epilogue.is_to_come(trainer)
        is_at_step_end = _lightning.is_at_step_end(trainer) and not is_to_come
        return {
            "at_epoch_end": _lightning.is_at_epoch_end(trainer),
            "is_whole": _lightning.is_epoch_whole(trainer),
            "at_step_end": is_at_step_end,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To be acted upon when training starts."""
        self._restored = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for what Lightning does only in epochs that weren't interrupted."""
        restored, self._restored = self._restored, None
        if not restored:
            return
        if restored["at_epoch_end"]:
            _lightning.take_epoch_as_over(trainer)
            if restored.get("is_whole", True):
                _step_by_metric(trainer, _lightning.callback_metrics(trainer, ask_others=False))
            return
        if restored["at_step_end"]:
            trainer.fit_loop.epoch_loop.update_lr_schedulers("step", update_plateau_schedulers=True)
        self._is_first_batch = True
        if _lightning.is_mid_epoch(trainer):
            for callback in _lightning.callbacks_of(trainer):
                if isinstance(callback, StochasticWeightAveraging):
                    callback.on_train_epoch_start(trainer, pl_module)
            show_place(trainer, pl_module, _lightning.batches_at_boundary(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The epoch has trained on: from here it is one like any other."""
        self._go_on(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where nothing but its end was left."""
        self._go_on(trainer)

    def _go_on(self, trainer: pl.Trainer) -> None:
        if self._is_first_batch:
            self._is_first_batch = False
            _lightning.end_restart(trainer)


def _step_by_metric(trainer: pl.Trainer, metrics: dict[str, Any]) -> None:
    for config in trainer.lr_scheduler_configs:
        is_due = config.interval == "epoch" and (trainer.current_epoch % config.frequency == 0)
        if config.reduce_on_plateau and is_due and config.monitor in metrics:
            config.scheduler.step(metrics[config.monitor])
