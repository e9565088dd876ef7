"""One stamp per optimizer step on the worker's board, and the phases in between."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from elastic_fit.callbacks import _lightning
from elastic_fit.supervisor.board import Board, Phase, Word


class Beat(pl.Callback):
    """Tells the agent where this worker is. Costs under a microsecond a step.

    Args:
        board: this worker's page.
    """

    def __init__(self, board: Board) -> None:
        self._board = board

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The process group is up."""
        self._board.enter(Phase.PROCESS_GROUP)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Model and data are there."""
        self._board.enter(Phase.BUILT)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is left to be restored."""
        self._board.enter(Phase.LOADED)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is left to be restored."""
        self._board.enter(Phase.LOADED)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An optimizer step is done, unless gradients are still being accumulated."""
        if _lightning.is_boundary(trainer):
            if not self._board[Word.FIRST_STEP_NS]:
                self._board.enter(Phase.TRAINING)
            self._board.stamp(trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation loop begins."""
        self._board.enter(Phase.VALIDATING)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """And ends."""
        self._board.enter(Phase.TRAINING if self._board[Word.FIRST_STEP_NS] else Phase.LOADED)
