"""RunCheckpoint: what saves under the launcher, for the run and with the settings of the command line."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import Logger

from elastic_fit.callbacks import _epilogue, _lightning, _nccl, release
from elastic_fit.callbacks.checkpoint import ElasticCheckpoint
from elastic_fit.callbacks.companions import companions
from elastic_fit.callbacks.emergency import StepGuard, why_no_rescue
from elastic_fit.callbacks.gate import Gate, gate_for
from elastic_fit.callbacks.loggers import pin
from elastic_fit.callbacks.seal import Seals, why_unsafe
from elastic_fit.callbacks.session import Session
from elastic_fit.callbacks.stop import PeerLost
from elastic_fit.callbacks.trace import StepTrace
from elastic_fit.supervisor.board import Word
from elastic_fit.supervisor.context import ResumePoint
from elastic_fit.supervisor.ledger import Ledger

log = logging.getLogger("elastic_fit")


class RunCheckpoint(ElasticCheckpoint):
    """The launcher's own: one folder per ``fit`` call, triggers from the command line, a final save.

    Args:
        worker: this worker's session.
    """

    def __init__(self, worker: Session) -> None:
        settings = worker.context.settings
        interval = settings.checkpoint_interval_s
        super().__init__(
            filename="{step}",
            every_n_epochs=1,
            every_n_train_steps=settings.checkpoint_steps,
            train_time_interval=timedelta(seconds=interval) if interval else None,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
            keep=settings.keep,
            finite_check=settings.finite_check,
        )
        self._worker = worker
        self._point: ResumePoint | None = None
        self._pinned: list[bool] = []
        self._active = False
        self._is_proven = False

    @property
    def state_key(self) -> str:
        """The same whatever the flags are: a command line may change between two starts of a run."""
        return "elastic_fit.RunCheckpoint"

    def assign(self, folder: Path | None, point: ResumePoint | None, loggers: Sequence[Logger] = ()) -> None:
        """Which folder the coming ``fit`` saves to, and where it goes on from; no folder, no saves.

        Its loggers go on with the files that this fit's earlier attempts have written.
        """
        self.dirpath = str(folder) if folder else None
        self._pinned = pin(loggers, folder) if folder else []
        self._active = folder is not None
        self._point = point
        self._worker.board[Word.SAVED_STEP] = 0  # an earlier fit's says nothing of this one
        self._last_global_step_saved = self._unranked_step = self.began_step = self.saved_step = (
            point.step if point else 0
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Seal the whole run's checkpoints: a stock ModelCheckpoint that saves there is sealed too."""
        if not self._active or stage != "fit":
            self._add_guards(trainer)
            return
        # With nothing to keep, Lightning doesn't warn of a folder that holds something: a run's own is no surprise.
        kept, self.save_top_k = self.save_top_k, 0
        super().setup(trainer, pl_module, stage)
        self.save_top_k = kept
        checkpoints = self._worker.folder.checkpoints
        Seals.of(trainer).add(checkpoints, self._worker.store(checkpoints))

    def _approved(self, trainer: pl.Trainer, path: Any) -> Any:
        """The launcher has verified the run's own, or was told to take it as it is."""
        return path if self._point is not None else super()._approved(trainer, path)

    @property
    def is_active(self) -> bool:
        """Whether this is a training of the run's, and no search or rehearsal."""
        return self._active

    @property
    def precedence(self) -> int:
        """Before any of the script's own."""
        return 2

    def _companions(self, trainer: pl.Trainer, *, is_resumed: bool) -> list[pl.Callback]:
        settings = self._worker.context.settings
        own = [one for one in _lightning.callbacks_of(trainer) if isinstance(one, ElasticCheckpoint)]
        asked = [one.global_batch_size for one in own if one.global_batch_size]
        found = companions(
            trainer,
            Path(str(self.dirpath)),
            self._pinned,
            strict=settings.strict_data,
            reproducible=settings.reproducible,
            global_batch=settings.global_batch_size or next(iter(asked), None),
        )
        if settings.trace_steps:
            found.append(StepTrace(Ledger(self._worker.folder.trace), self._worker.fits))
        return found

    def _is_off(self, trainer: pl.Trainer) -> bool:
        return not self._active or super()._is_off(trainer)

    def _should_skip_saving_checkpoint(self, trainer: pl.Trainer) -> bool:
        return (
            not self._active or self._saved_at(trainer.global_step) or super()._should_skip_saving_checkpoint(trainer)
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something that can be rescued, in another thread if need be."""
        super().on_train_start(trainer, pl_module)
        release.stand_in = functools.partial(self._rescue_for_a_stuck_thread, trainer)
        release.gate = StepGuard.of(trainer).gate
        is_restart = self._point is not None and not self._point.finished
        if is_restart and _is_stopped_early(trainer):
            trainer.should_stop = True  # which is in no checkpoint

    def _make_gate(self, trainer: pl.Trainer) -> Gate | None:
        is_to_be_rescued = self._replicas is not None or _lightning.is_replicated(trainer)
        if release.trouble is None or not is_to_be_rescued:
            return None
        return gate_for(trainer.strategy.root_device, _break_off)

    def _rescue_for_a_stuck_thread(self, trainer: pl.Trainer, is_last_time: bool) -> bool:
        """What the main thread would save if it came back. In the middle of an optimizer step there is nothing."""
        is_alone = trainer.world_size == 1  # then no other rank is what it waits for
        if self._is_off(trainer) or is_alone:
            return False
        if not is_last_time and why_no_rescue(trainer, self._replicas) is not None:
            return False
        stuck = PeerLost("another rank has failed, and the main thread does not come back from what it waits for")
        return self._rescue(trainer, stuck)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit that had ended early is restored and not trained again; one that hadn't ended calls its last hooks."""
        point = self._point
        if not self._active or point is None:
            return
        if not point.finished:
            _epilogue.start_anyway(trainer)
        elif point.ended_early:
            trainer.should_stop = True

    def _after_save(self, trainer: pl.Trainer) -> None:
        super()._after_save(trainer)
        if self._is_proven or not trainer.is_global_zero or self._worker.context.settings.load_unsafe:
            return
        self._is_proven = True
        newest = Path(str(self.dirpath)) / f"step={trainer.global_step}.ckpt"
        if why := why_unsafe(newest):
            self._worker.ledger.write("unsafe", path=str(newest), why=why)
            log.warning(
                "elastic-fit: a restart won't be able to load %s: it holds more than tensors and plain values (%s). "
                "Leave that out of save_hyperparameters() and the module's state, or start with --load-unsafe.",
                newest,
                why,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last save of a fit says that it has ended, and how."""
        release.stand_in = None
        if self._is_off(trainer) or (self._point and self._point.finished and self._point.step == trainer.global_step):
            return
        self.save_now(trainer, "final", finished=True, ended_early=_is_stopped_early(trainer))
        self._worker.board[Word.END_UNSAVED] = int(self._seals is not None and self._seals.last_failure is not None)


def _break_off() -> None:
    _nccl.abort()
    release.abort_collectives()


def _is_stopped_early(trainer: pl.Trainer) -> bool:
    stoppers = [one for one in _lightning.callbacks_of(trainer) if isinstance(one, EarlyStopping)]
    # Of one that stops in the first epoch, the epoch alone doesn't tell.
    return any(one.stopped_epoch or one.stopping_reason is not EarlyStoppingReason.NOT_STOPPED for one in stoppers)
