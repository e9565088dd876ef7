"""What a person should see in Lightning's own progress bar: its place, the last safe step, and restarts of the run."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from elastic_fit.callbacks.session import Session
from elastic_fit.supervisor.board import Word


class RunProgress(pl.Callback):
    """Adds ``saved`` (step of the newest checkpoint) and ``restarts`` to the bar's metrics.

    The bar stays Lightning's, whichever one the script has chosen; a script without a bar gets none.

    Args:
        worker: this worker's session.
    """

    def __init__(self, worker: Session) -> None:
        self._worker = worker

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have the bar ask us as well."""
        bar = trainer.progress_bar_callback
        if stage == "fit" and bar is not None and not hasattr(bar.get_metrics, "__wrapped__"):
            bar.get_metrics = self._with_ours(bar.get_metrics)  # type: ignore[method-assign]

    def _with_ours(self, get_metrics: Any) -> Any:
        @functools.wraps(get_metrics)
        def with_ours(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
            return {**get_metrics(trainer, pl_module), **self.metrics()}

        return with_ours

    def metrics(self) -> dict[str, int]:
        """What is worth showing now."""
        board, context = self._worker.board, self._worker.context
        saved = max(board[Word.SAVED_STEP], self._resumed_step())
        shown = {"saved": saved} if saved else {}
        return {**shown, "restarts": context.attempt} if context.attempt else shown

    def _resumed_step(self) -> int:
        point = self._worker.context.resume_point(self._worker.fits)
        return point.step if point else 0


def show_place(trainer: pl.Trainer, pl_module: pl.LightningModule, done: int) -> None:
    """Begin the bar of an epoch of which `done` batches are behind us; Lightning does so for whole epochs alone."""
    bar = trainer.progress_bar_callback
    if bar is None:
        return
    bar.on_train_epoch_start(trainer, pl_module)
    if isinstance(bar, TQDMProgressBar):
        shown = bar.train_progress_bar
        shown.initial = shown.n = done  # its rate is that of what comes
        shown.refresh()
    elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, completed=done)
