"""What follows an optimizer step before the next batch: a validation, the end of the epoch. It is done once, whole.

A rank that saves alone can complete neither: others would have to take part. So whatever it has done of it by then, it
saves the state before it, and a restart from there does all of it. What they change, the loops' counters, schedulers,
learning rates, buffers and the states of callbacks, is small, and copied beforehand; the parameters they leave alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from elastic_fit.callbacks import _epilogue, _lightning
from elastic_fit.callbacks.collective import is_saving_alone, saving_alone
from elastic_fit.callbacks.logged import LoggedResults
from elastic_fit.callbacks.loggers import ContinuedLoggers
from elastic_fit.callbacks.position import DataPosition
from elastic_fit.callbacks.randomness import RandomStreams

log = logging.getLogger("elastic_fit")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    batches: int
    """Training batches begun by then: it holds until another one begins."""
    boundary: int
    """Batches whose optimizer step was done by then. In the midst of an accumulation it holds until there are more."""
    is_at_boundary: bool
    state: _epilogue.SmallState

    @classmethod
    def of(cls, trainer: pl.Trainer) -> _Before:
        """As it is now."""
        return cls(
            batches=_lightning.batches_begun(trainer),
            boundary=_lightning.batches_in_all(trainer),
            is_at_boundary=_lightning.is_boundary(trainer),
            state=_epilogue.SmallState.of(trainer),
        )

    def holds(self, trainer: pl.Trainer) -> bool:
        """Whether a save now, which goes back to the last optimizer step, goes back behind it."""
        if self.batches == _lightning.batches_begun(trainer):
            return True
        return not self.is_at_boundary and self.boundary == _lightning.batches_in_all(trainer)


class Epilogue(pl.Callback):
    """Has a survivor's save hold the state before a validation or an epoch's end that is under way, or just over.

    So it is with any save in the hooks of a batch that one of these follows, and with one that all ranks make within a
    validation: that will be done from its start.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._before: _Before | None = None
        self._swaps: _epilogue.Swaps | None = None
        self._restored: dict[str, Any] = {}
        self._has_told = False

    @property
    def state_key(self) -> str:
        """Constant."""
        return "elastic_fit.Epilogue"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Be called when a batch is done."""
        if stage == "fit":
            self._trainer, self._before = trainer, None
            _epilogue.leave_alone(trainer)
            self._swaps = _epilogue.Swaps(trainer)
            _epilogue.call_before(trainer, self._keep)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            _epilogue.leave_alone(trainer)
            self._before = None

    def _keep(self) -> None:
        trainer = self._trainer
        if trainer is None or (self._before is not None and self._before.holds(trainer)):
            return
        self._before = None
        if _lightning.is_followed_by_more(trainer):
            try:
                with saving_alone():
                    self._before = _Before.of(trainer)
            except Exception as error:  # noqa: BLE001 - states of the script's callbacks, which may raise anything
                if not self._has_told:
                    log.warning(
                        "elastic-fit: the state of a callback or a scheduler can't be copied (%s: %s). A rescue or a "
                        "stop within a validation or at an epoch's end holds what had been done of it by then.",
                        type(error).__name__,
                        error,
                    )
                self._has_told = True

    def state_dict(self) -> dict[str, Any]:
        """Whether it is to come, and what of it."""
        trainer = self._trainer
        if trainer is None or not _epilogue.is_to_come(trainer):
            return {}
        return {
            "is_to_come": True,
            "validates": _lightning.is_validation_next(trainer),
            "should_stop": trainer.should_stop and is_saving_alone(),
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Whatever of it has been done is to come."""
        if self._swaps is None or "callbacks" not in checkpoint:
            return  # not in a training
        self._swaps.undo_in(checkpoint)
        before = self._before if self._before is not None and self._before.holds(trainer) else None
        if before is not None and is_saving_alone():
            before.state.put_into(checkpoint, but=())
        elif before is not None and _lightning.is_validation_under_way(trainer):
            before.state.put_into(checkpoint, but=_kept_by_all(trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To be acted upon when training starts."""
        self._restored = state_dict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The training may have done its last step."""
        if self._restored.get("is_to_come"):
            _epilogue.start_anyway(trainer, is_batch_done=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with it."""
        restored, self._restored = self._restored, {}
        if restored.get("is_to_come"):
            _epilogue.begin_with_it(trainer, validates=restored["validates"], should_stop=restored["should_stop"])


def _kept_by_all(trainer: pl.Trainer) -> list[str]:
    """The callbacks that keep what every rank holds, as of the last optimizer step, also within a validation."""
    kinds = (DataPosition, RandomStreams, LoggedResults, ContinuedLoggers)
    return [one.state_key for one in _lightning.callbacks_of(trainer) if isinstance(one, kinds)]
