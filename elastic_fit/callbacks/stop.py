"""Stopping together: all ranks agree on one boundary, save there, and leave with exit code 75.

While nobody asks, a boundary costs one read of memory. How ranks agree is `elastic_fit.supervisor.agreement`; here is
where the boundaries are. A boundary is a place where a checkpoint resumes to the same run:

- the end of a batch that completed an optimizer step, unless a validation or the end of the epoch follows: the
  checkpoint would leave those out;
- each batch of a validation. The checkpoint holds the state before it: it is to be done from its start (half of a
  metric is in no checkpoint), with the random streams of its start. See `elastic_fit.callbacks.epilogue`;
- the end of a validation in the middle of an epoch, but not of an accumulation; and the end of an epoch;
- the start of the sanity check, each of its batches, and the start of the training: nothing new is there to be saved;
- each batch of a test, of a prediction and of a validation outside of ``fit``: nothing is left to be saved.

Never in the middle of an accumulation, except where the time is too short to wait for its end: then the state of the
last optimizer step is saved, and the batches since then will be taken again. The ledger says so.

Saving is collective where the strategy is sharded, so *all* ranks have to be at the agreed boundary, and are. Rank 0
decides whether to save and tells the others through the store: their clocks and their guesses may differ, and half a
group in a collective save would never end. Waiting is sound there, because nobody has anything else to do.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from elastic_fit.callbacks import _lightning, session
from elastic_fit.callbacks import desk as desks
from elastic_fit.callbacks.latch import AtOnce, Told
from elastic_fit.supervisor.agreement import STOP_KEY
from elastic_fit.supervisor.board import StopMode, Word
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.exits import Exit
from elastic_fit.supervisor.ledger import read
from elastic_fit.supervisor.stop import LEAST_MARGIN_S, SLACK, Choice, unsaved_after, weigh

if TYPE_CHECKING:
    from elastic_fit.callbacks.checkpoint import ElasticCheckpoint

log = logging.getLogger("elastic_fit")

MEASURED_SAVES = 5
"""How many of the last saves a prediction looks at: the slowest of them counts."""
MEASURED_BATCHES = 3
"""How many of the last batches of an accumulation a guess at its end looks at: the slowest of them counts."""
LONGEST_WAIT = timedelta(hours=1)
"""For rank 0's word where the stop has no deadline."""


class PeerLost(RuntimeError):
    """Another rank of the job has failed; this one leaves."""


class Stopper(Checkpoint):
    """Looks at every boundary whether somebody asks to stop.

    Lightning calls callbacks of this kind after all others, also at the end of an epoch: what they change is part of
    what is saved.
    """

    def __init__(self) -> None:
        self._desk = desks.current()
        self._batches_s: deque[float] = deque(maxlen=MEASURED_BATCHES)
        self._began_s = 0.0

    @property
    def state_key(self) -> str:
        """Constant; there is no state."""
        return "elastic_fit.Stopper"

    # ours instead of Lightning's

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """From here to `teardown` signals latch, and Lightning neither handles SIGTERM nor broadcasts it."""
        latch = self._desk.latch
        latch.is_in_trainer = True
        if not _lightning.requeues_by_itself(trainer):
            _lightning.take_signals(trainer)
            latch.install()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave everything as it was."""
        self._desk.latch.is_in_trainer = False
        _lightning.give_signals_back(trainer)
        if session.current() is None:
            self._desk.latch.restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning tears nothing down for us then, and a script may catch it and go on. One that stops is leaving."""
        if isinstance(exception, AtOnce) and (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(signal.SIGKILL)  # the ranks that Lightning has started from this process
        if not isinstance(exception, Told):
            self.teardown(trainer, pl_module, "")

    # boundaries

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first validation batch."""
        self._reinstall(trainer)
        self._at_boundary(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first training batch."""
        self._reinstall(trainer)
        self._at_boundary(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An optimizer step is done, or part of an accumulation."""
        if not _lightning.is_boundary(trainer):
            self._desk.next_within()
            if self._desk.request:
                self._within_accumulation(trainer)
            return
        self._desk.next_round()
        if self._desk.request and (not _lightning.is_followed_by_more(trainer) or self._desk.mode is StopMode.RESCUE):
            self._stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation begins; its batches are boundaries."""
        self._at_boundary(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """A batch of a validation is done."""
        self._at_boundary(trainer, within=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation is over; the end of the epoch may follow, or the rest of an accumulation."""
        self._desk.next_round()
        is_followed = trainer.state.fn == TrainerFn.FITTING and (
            trainer.sanity_checking or _lightning.is_epoch_ending(trainer) or not _lightning.is_boundary(trainer)
        )
        if self._desk.request and not is_followed:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch is over."""
        self._at_boundary(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A test begins."""
        self._at_boundary(trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """A batch of a test is done."""
        self._at_boundary(trainer, within=True)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A prediction begins."""
        self._at_boundary(trainer)

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """A batch of a prediction is done."""
        self._at_boundary(trainer, within=True)

    def _reinstall(self, trainer: pl.Trainer) -> None:
        if not _lightning.requeues_by_itself(trainer):
            self._desk.latch.install()

    def _at_boundary(self, trainer: pl.Trainer, *, within: bool = False) -> None:
        if within:
            self._desk.next_within()
        else:
            self._desk.next_round()
        if self._desk.request:
            self._stop(trainer)

    # stopping

    def _stop(self, trainer: pl.Trainer, *, late: bool = False) -> None:
        if self._desk.mode is StopMode.RESCUE:
            raise PeerLost("another rank has failed: leaving, so that the job can go on")
        # The device may be steps behind: without this, ranks would agree on a step that is far from what is computed.
        _lightning.synchronize(trainer)
        if self._desk.is_agreed(trainer, late=late):
            raise Told(self._save_and_tell(trainer, late=late))

    def _within_accumulation(self, trainer: pl.Trainer) -> None:
        """Stop here only if the deadline comes before the accumulation's end and a save after it."""
        if self._desk.mode is StopMode.RESCUE:
            self._stop(trainer)
        now = time.monotonic()
        if self._began_s:
            self._batches_s.append(now - self._began_s)
        self._began_s = now
        # Whoever has been late once goes on asking: to leave a boundary unasked is to pass the place that others seal.
        if self._desk.has_been_late or self._is_late(trainer):
            self._stop(trainer, late=True)

    def _is_late(self, trainer: pl.Trainer) -> bool:
        left_s = self._left_s()
        if left_s is None:
            return False
        save_s = self._predicted_s() or 0.0
        batch_s = max(self._batches_s, default=0.0)
        return left_s < save_s * SLACK + LEAST_MARGIN_S + batch_s * _lightning.batches_to_boundary(trainer)

    def _save_and_tell(self, trainer: pl.Trainer, *, late: bool) -> int:
        """All ranks are here. Save if rank 0 says so; returns the exit code, the same on all ranks."""
        checkpoint = saver_of(trainer)
        choice = _from_rank_0(trainer, "choice", lambda: self._choose(trainer, checkpoint, late), self._left_s())
        if choice["save"] and checkpoint is not None:
            checkpoint.save_now(trainer, "stop")
        outcome = _from_rank_0(trainer, "outcome", lambda: self._outcome(trainer, checkpoint), self._left_s())
        return int(outcome["code"])

    def _choose(self, trainer: pl.Trainer, checkpoint: ElasticCheckpoint | None, late: bool) -> dict[str, Any]:
        left_s, predicted_s = self._left_s(), self._predicted_s()
        if checkpoint is None or trainer.state.fn != TrainerFn.FITTING:
            choice = Choice(save=False, why="nothing is trained here")
        else:
            choice = weigh(
                wanted=self._desk.mode is StopMode.SAVE,
                left_s=left_s,
                predicted_s=predicted_s,
                step=trainer.global_step,
                saved_step=checkpoint.saved_step,
                began_step=checkpoint.began_step,
            )
        worker = session.current()
        if worker is not None:
            worker.ledger.write(
                "stop_decision",
                step=trainer.global_step,
                save=choice.save,
                why=choice.why,
                left_s=None if left_s is None else round(left_s, 3),
                predicted_s=predicted_s,
                half_accumulated=_lightning.batches_half_accumulated(trainer) if late else 0,
            )
        log.info("elastic-fit: stopping after step %d: %s", trainer.global_step, choice.why)
        return {"save": choice.save}

    def _outcome(self, trainer: pl.Trainer, checkpoint: ElasticCheckpoint | None) -> dict[str, Any]:
        """Saved: all that was done is on disk, and something of it is new."""
        is_fit = trainer.state.fn == TrainerFn.FITTING
        is_safe = not is_fit or (checkpoint is not None and checkpoint.saved_step >= trainer.global_step)
        worker = session.current()
        saver = worker if worker is not None else checkpoint
        is_new = saver is not None and saver.has_saved
        is_wanted = self._desk.mode is StopMode.SAVE
        return {"code": int(Exit.SAVED if is_safe and is_new and is_wanted else self._unsaved())}

    def _unsaved(self) -> Exit:
        """The exit status where nothing new was saved. A launcher knows by itself who has asked, and is told one."""
        if session.current() is not None:
            return Exit.TERMINATED
        return unsaved_after(self._desk.board[Word.SIGNALLED])

    def _left_s(self) -> float | None:
        deadline_ns = self._desk.deadline_ns
        return (deadline_ns - time.monotonic_ns()) / 1e9 if deadline_ns else None

    def _predicted_s(self) -> float | None:
        """How long a save takes, by the slowest of the run's last ones; None where there was none that is known of."""
        worker = session.current()
        if worker is None:
            return None
        try:
            saves = [float(event["seconds"]) for event in read(worker.ledger.path) if event.event == "save"]
        except StorageError as error:
            log.warning("elastic-fit: how long a save takes is not known: %s", error.message)
            return None
        return max(saves[-MEASURED_SAVES:], default=None)


def saver_of(trainer: pl.Trainer) -> ElasticCheckpoint | None:
    """Which callback saves for the next start: of several the one whose folder that start goes on from."""
    from elastic_fit.callbacks.checkpoint import ElasticCheckpoint

    found = [one for one in _lightning.callbacks_of(trainer) if isinstance(one, ElasticCheckpoint)]
    saver = max(found, key=lambda one: one.precedence, default=None)
    return saver if saver is not None and saver.is_active else None


def _from_rank_0(trainer: pl.Trainer, name: str, make: Any, left_s: float | None) -> dict[str, Any]:
    """What rank 0 says, on every rank, through the store."""
    store = _lightning.job_store()
    if trainer.world_size == 1 or store is None:
        said: dict[str, Any] = make()
        return said
    key, heard = f"{STOP_KEY}/{name}", f"{STOP_KEY}/{name}/heard"
    limit = LONGEST_WAIT if left_s is None else timedelta(seconds=max(1.0, left_s + 1.0))
    if trainer.is_global_zero:
        said = make()
        store.set(key, json.dumps(said))
        # Rank 0 may be the one that serves the store, and must not leave before all have heard it.
        store.wait([f"{heard}/by-all"], limit)
        return said
    store.wait([key], limit)
    said = json.loads(store.get(key))
    if store.add(heard, 1) == trainer.world_size - 1:
        store.set(f"{heard}/by-all", "1")
    return said
