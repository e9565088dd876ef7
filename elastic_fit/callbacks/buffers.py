"""Buffers as of the last optimizer step: BatchNorm's statistics and the like, which a forward pass changes already.

A rescue, and a stop in the middle of an accumulation, save the parameters of the last optimizer step while later
batches are under way, and those batches will be taken again. Their forward passes are in no parameter, but in the
buffers: so these are copied before a step's first forward pass, and saved as they were. Where DDP makes the ranks'
buffers equal at the start of a forward pass, the copy is taken after that, and is rank 0's on every rank, as it would
be in a checkpoint of that step.

A device that works behind its process may never come to that: then the ranks' own, copied before, serve.
"""

from __future__ import annotations

import operator
from typing import Any

import lightning.pytorch as pl
import torch

from elastic_fit.callbacks import _buffers, _lightning
from elastic_fit.callbacks.emergency import StepGuard
from elastic_fit.callbacks.gate import Gate

MADE_EQUAL = "buffers made equal"
"""A mark in the device's queue."""


class BoundaryBuffers(pl.Callback):
    """Has every capture between two optimizer steps hold the buffers of the first of them.

    Costs one copy of the model's persistent buffers a step, two with a gate; nothing where it has none.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._places: dict[str, _buffers.Place] = {}
        self._live: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        self._own: list[torch.Tensor] = []
        self._boundary = -1
        self._is_told_by_ddp = False
        self._gate: Gate | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is as it will be trained."""
        self._trainer, self._boundary, self._live = trainer, -1, []
        self._places = _buffers.persistent_buffers(trainer)
        if self._places:
            self._is_told_by_ddp = _buffers.call_before_forward(trainer, self._keep)
            _buffers.amend_state(trainer, self._amend)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """They are this rank's own until somebody makes the ranks' buffers equal, which may be nobody."""
        if not self._places:
            return
        guard = StepGuard.found(trainer)
        self._gate = guard.gate if guard is not None and self._is_told_by_ddp else None
        if not self._is_told_by_ddp:
            self._keep()
        elif self._gate is not None and _lightning.batches_in_all(trainer) != self._boundary:
            self._own = [tensor.detach().clone() for tensor in self._live_ones()]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the trainer as it was."""
        _buffers.amend_state(trainer, None)
        self._trainer, self._live, self._kept, self._own = None, [], [], []

    def _keep(self) -> None:
        """Copy them, once between two optimizer steps."""
        trainer = self._trainer
        if trainer is None or not trainer.training:
            return
        boundary = _lightning.batches_in_all(trainer)
        if boundary == self._boundary:
            return
        self._boundary = -1  # a copy that is half done is no copy
        live = self._live_ones()
        if len(live) == len(self._live) and all(map(operator.is_, live, self._live)):
            _buffers.copy_all(live, self._kept)
        else:
            self._live, self._kept = live, [tensor.detach().clone() for tensor in live]
        self._boundary = boundary
        if self._gate is not None:
            self._gate.mark(MADE_EQUAL)

    def _live_ones(self) -> list[torch.Tensor]:
        live = [tensor for buffers, own in self._places.values() if (tensor := buffers.get(own)) is not None]
        # A module may put another tensor in a buffer's place, of whatever shape, or give one up.
        if len(live) < len(self._places) and self._trainer is not None:
            self._places = _buffers.persistent_buffers(self._trainer)
            live = [buffers[own] for buffers, own in self._places.values()]
        return live

    def _amend(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the model, with the buffers of the last optimizer step if batches are under way since."""
        if self._trainer is not None and _lightning.batches_in_all(self._trainer) == self._boundary:
            is_equal = self._gate is None or self._gate.was_reached(MADE_EQUAL)
            state.update(zip(self._places, self._kept if is_equal else self._own, strict=True))
        return state
