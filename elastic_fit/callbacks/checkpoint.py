"""ElasticCheckpoint: Lightning's ModelCheckpoint, with sealed files, triggers that work together, and resume."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from elastic_fit.callbacks import _lightning, session
from elastic_fit.callbacks.cadence import Cadence
from elastic_fit.callbacks.companions import companions
from elastic_fit.callbacks.emergency import StepGuard, rescue
from elastic_fit.callbacks.epilogue import Epilogue
from elastic_fit.callbacks.gate import Gate
from elastic_fit.callbacks.latch import Told
from elastic_fit.callbacks.loggers import pin_late
from elastic_fit.callbacks.replicas import Replicas, agree
from elastic_fit.callbacks.resume import approved, choose, sweep
from elastic_fit.callbacks.seal import Purpose, Seals
from elastic_fit.callbacks.stop import Stopper, saver_of
from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.store import CheckpointStore, LastN, is_remote, open_store, surplus

log = logging.getLogger("elastic_fit")


class ElasticCheckpoint(ModelCheckpoint):
    """A drop-in for Lightning's ModelCheckpoint whose checkpoints are sealed and never lie.

    Every argument and attribute of ModelCheckpoint means what it means there. Beyond it:

    - ``every_n_train_steps``, ``every_n_epochs`` and ``train_time_interval`` work together: whichever comes first.
      The time goes on counting over restarts and under manual optimisation.
    - A monitored metric that is not there yet doesn't put off a save by steps or time: it is written as
      ``step=N.ckpt``, unranked, and the newest `keep` of these stay.
    - ``monitor=None`` with `keep`: the newest `keep` by step stay.

    Args:
        resume: ``"auto"`` goes on from the newest valid checkpoint of `dirpath`, a path from that one, None from
            what ``fit(ckpt_path=...)`` says. For use without the launcher, which decides by itself once the run has
            a checkpoint of its own.
        emergency: save what is whole when a rank fails or a signal asks to stop.
        keep: how many of the saves that no metric ranks stay.
        finite_check: look for NaN and Inf before each save; what holds them is kept and never resumed from.
        exact: keep the position in the training data and the random streams as well, so that a resumed run is the
            same run.
        global_batch_size: samples of an optimizer step over all ranks, kept by accumulation whatever their number is;
            needs `exact`.

    Errors: a save that fails (a full disk) is logged and the training goes on; the next trigger tries a new file.
    With ``resume="auto"``, NoValidCheckpoint where there are checkpoints and none of them holds.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        *,
        resume: str | os.PathLike[str] | None = None,
        emergency: bool = True,
        keep: int | None = None,
        finite_check: bool = True,
        exact: bool = True,
        global_batch_size: int | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        super().__init__(
            dirpath=os.fspath(dirpath) if dirpath is not None else None,
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last,
            save_top_k=save_top_k if monitor is not None or keep is None else -1,
            save_on_exception=save_on_exception,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
        )
        triggers = (every_n_train_steps, train_time_interval, every_n_epochs)
        if any(number is not None and number < 0 for number in (every_n_train_steps, every_n_epochs)):
            raise ValueError("every_n_train_steps and every_n_epochs must not be negative")
        self._every_n_train_steps = every_n_train_steps or 0
        self._train_time_interval = train_time_interval
        self._every_n_epochs = (every_n_epochs or 0) if any(one is not None for one in triggers) else 1
        self.resume = resume
        self.emergency = emergency
        self.keep = keep
        self.finite_check = finite_check
        self.exact = exact
        self.global_batch_size = global_batch_size
        self._cadence = Cadence(train_time_interval.total_seconds() if train_time_interval is not None else None)
        self._seals: Seals | None = None
        self._store: CheckpointStore | None = None
        self._unranked_step = 0
        self._postponed: str | None = None
        self._validated = False
        self._replicas: Replicas | None = None
        self.began_step = 0
        """The step that this ``fit`` began at; where it isn't 0, there is a checkpoint of it."""
        self.saved_step = 0
        """The newest step that is safe on disk, as far as this rank knows."""
        self.has_saved = False
        """Whether this callback has saved anything."""

    @property
    def is_active(self) -> bool:
        """Whether there is a folder to save to."""
        return self.dirpath is not None

    @property
    def precedence(self) -> int:
        """Of several in one trainer, the highest saves at a stop: from what it saves the next start goes on."""
        return int(self.resume is not None)

    # setting up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Resolve the folder and seal it."""
        super().setup(trainer, pl_module, stage)
        is_fit = stage == "fit" and self.dirpath is not None
        path = self._open(trainer) if is_fit else None
        # Lightning goes through its list of callbacks while we add to it: they are set up right after us.
        if is_fit and self.exact and self._is_for_next_start(trainer):
            _lightning.callbacks_in(trainer).extend(self._companions(trainer, is_resumed=path is not None))
        if self.emergency:
            self._add_guards(trainer)
            StepGuard.of(trainer)
        if is_fit:
            _lightning.decide_restore(trainer, lambda given: path or self._approved(trainer, given))

    def _approved(self, trainer: pl.Trainer, path: Any) -> Any:
        """The checkpoint that ``fit`` was called with, verified."""
        return approved(path, trainer)

    def _open(self, trainer: pl.Trainer) -> str | None:
        """Seal the folder, sweep it, and choose what of it to go on from."""
        assert self.dirpath is not None
        self._seals = Seals.of(trainer)
        self._seals.finite_check = self.finite_check
        if is_remote(self.dirpath) and not _lightning.writes_plain_files(trainer.strategy):
            raise UsageError(
                f"{type(trainer.strategy).__name__} writes shards, which {self.dirpath} can't take",
                hint="save sharded checkpoints to a folder of a file system that all nodes share",
            )
        self._store = self._make_store(self.dirpath)
        self._seals.add(self.dirpath, self._store)
        if self._is_to_sweep(trainer):
            with self._seals.telling():  # the other ranks wait for what this one chooses
                sweep(self._store)
        worker = session.current()
        if worker is not None and worker.context.resume_point(worker.fits):
            return None  # the run has a checkpoint of its own
        return choose(self.resume, self.dirpath, trainer)

    def _is_to_sweep(self, trainer: pl.Trainer) -> bool:
        """Whether this rank sweeps the folder: one of each node, for only there is it known which processes are dead.

        The launcher has done it, but for an object store, which needs nobody on each node.
        """
        if is_remote(str(self.dirpath)):
            return trainer.is_global_zero
        return session.current() is None and trainer.local_rank == 0

    def _is_for_next_start(self, trainer: pl.Trainer) -> bool:
        """Whether what this one saves may be gone on from: under the launcher that is the run's own alone."""
        return session.current() is None or saver_of(trainer) is self

    @staticmethod
    def _add_guards(trainer: pl.Trainer) -> None:
        callbacks = _lightning.callbacks_in(trainer)
        if not any(isinstance(one, Stopper) for one in callbacks):
            callbacks.extend([Epilogue(), Stopper()])

    def _companions(self, trainer: pl.Trainer, *, is_resumed: bool) -> list[pl.Callback]:
        folder = None if is_remote(str(self.dirpath)) else Path(str(self.dirpath))
        pinned = pin_late(trainer.loggers, folder) if folder and is_resumed else [False] * len(trainer.loggers)
        return companions(trainer, folder, pinned, global_batch=self.global_batch_size)

    def _make_store(self, root: Path | str) -> CheckpointStore:
        worker = session.current()
        return worker.store(root) if worker else open_store(root)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first moment at which the state is restored and a stop may save it."""
        self._begin(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; what was counted before a restart still counts."""
        super().on_train_start(trainer, pl_module)
        self._begin(trainer)
        self._cadence.start(trainer.global_step, self._every_n_train_steps)
        if self.emergency and self.is_active and self._is_for_next_start(trainer):
            self._replicas = agree(trainer)
            guard = StepGuard.of(trainer)
            if guard.gate is None or guard.gate.is_closed:
                guard.gate = self._make_gate(trainer)
            is_in_step = trainer.strategy.root_device.type == "cpu" or guard.gate is not None
            guard.replicas = self._replicas if is_in_step else None

    def _make_gate(self, trainer: pl.Trainer) -> Gate | None:
        """Nothing, without a launcher: nobody would close it, before NCCL's own watchdog ends the process."""
        return None

    def _begin(self, trainer: pl.Trainer) -> None:
        """Take note of the step that this ``fit`` begins at; rank 0 looks whether it has gone back behind others.

        Where it can't look the training fails: what it saves might count as older than what is there.
        """
        self.began_step = self.saved_step = trainer.global_step
        store = self._store
        if store is None or self._seals is None or not self.is_active:
            return
        if trainer.is_global_zero:
            behind = store.begin(trainer.global_step)
            if behind is not None:
                log.warning(
                    "elastic-fit: going on from step %d, behind %s (step %d): what is saved from here on is newer",
                    trainer.global_step,
                    behind.path.name,
                    behind.manifest.step,
                )
        store.branch = trainer.strategy.broadcast(store.branch)

    # triggers

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At an optimizer step: save if steps or time say so."""
        if not _lightning.is_boundary(trainer) or self._is_off(trainer):
            return
        due = self._cadence.due(trainer)
        if due and not self._saved_at(trainer.global_step):
            if _lightning.is_followed_by_more(trainer):
                # A checkpoint of this moment would leave out the validation, or the end of the epoch, that follows.
                self._postponed = due
            else:
                self._save_due(trainer, due)

    def _is_off(self, trainer: pl.Trainer) -> bool:
        return _lightning.is_rehearsal(trainer) or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking

    def _saved_at(self, step: int) -> bool:
        return step in (self._last_global_step_saved, self._unranked_step)

    def _save_due(self, trainer: pl.Trainer, kind: str) -> None:
        candidates = self._monitor_candidates(trainer)
        with self._purpose(kind):
            if self.monitor is not None and self.monitor not in candidates:
                self._defer_save_until_validation = True
                self.save_unranked(trainer, weights_only=self.save_weights_only)
            else:
                self._save_topk_checkpoint(trainer, candidates)
                self._save_last_checkpoint(trainer, candidates)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if epochs say so, or a validation at the epoch's end did."""
        validated, self._validated = self._validated, False
        with self._purpose("epoch"):
            self._rank_deferred(trainer)
            if validated:
                super().on_validation_end(trainer, pl_module)
            super().on_train_epoch_end(trainer, pl_module)
        self._save_postponed(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if epochs say so and validation is what they end with."""
        if self._is_off(trainer):
            return
        if _lightning.is_epoch_ending(trainer):
            self._validated = True  # the end of the epoch follows, and belongs into the checkpoint
            return
        with self._purpose("epoch"):
            self._rank_deferred(trainer)
            super().on_validation_end(trainer, pl_module)
        self._save_postponed(trainer)

    def _save_postponed(self, trainer: pl.Trainer) -> None:
        """What was due when the epoch's last batch, or one before a validation, had ended."""
        due, self._postponed = self._postponed, None
        if due and not self._is_off(trainer) and not self._saved_at(trainer.global_step):
            self._save_due(trainer, due)

    def _rank_deferred(self, trainer: pl.Trainer) -> None:
        """The metric that a save by steps or time had to do without is there now: rank this state by it."""
        if not self._defer_save_until_validation or self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor in candidates:
            self._defer_save_until_validation = False
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    # saving

    def _purpose(self, kind: str, **extra: Any) -> _Purposeful:
        return _Purposeful(self._seals, Purpose(kind=kind, extra=extra))

    def save_now(self, trainer: pl.Trainer, kind: str, **extra: Any) -> None:
        """Save the whole state at this point, with all ranks taking part.

        Also where a save of the same step was tried and failed, or held weights only: a training is to go on from it.
        """
        with self._purpose(kind, **extra):
            self.save_unranked(trainer, suffix="-final" if extra else "", weights_only=False)

    def save_unranked(self, trainer: pl.Trainer, suffix: str = "", *, weights_only: bool) -> None:
        """Write ``step=N.ckpt``, which no metric ranks, and let older ones of its kind go."""
        assert self.dirpath is not None
        name = f"step={trainer.global_step}{suffix}.ckpt"
        with Seals.of(trainer).timed():
            trainer.save_checkpoint(os.path.join(self.dirpath, name), weights_only)
        self._unranked_step = trainer.global_step
        self._after_save(trainer)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        with Seals.of(trainer).timed():
            super()._save_checkpoint(trainer, filepath)
        self._after_save(trainer)

    def _after_save(self, trainer: pl.Trainer) -> None:
        self._cadence.saved(trainer.global_step)
        seals = self._seals
        if seals is None or seals.is_last_of_use:
            self.saved_step, self.has_saved = trainer.global_step, True
        if trainer.is_global_zero and seals is not None and seals.last_failure is None:
            self._let_go(trainer)

    def _let_go(self, trainer: pl.Trainer) -> None:
        """Remove what retention doesn't keep: never what is ranked, and never the last valid one."""
        store = self._store
        if self._seals is None or store is None or (self.keep is None and self.monitor is None):
            return
        ranked = {os.path.basename(path) for path in (*self.best_k_models, self.last_model_path)}
        resumed = os.path.basename(str(trainer.ckpt_path or ""))
        with self._seals.telling():
            for name in surplus(store.valid(), LastN(self.keep or 1), pinned=frozenset({*ranked, resumed})):
                if name.startswith("step=") or self.monitor is None:
                    store.remove(name)

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        """Swap the symlink by rename, where Lightning would remove it first. A save that failed is not linked to."""
        seals = Seals.of(trainer)
        is_itself = os.path.abspath(filepath) == os.path.abspath(linkpath)
        if trainer.is_global_zero and not is_itself and seals.last_failure is None:
            seals.link(filepath, linkpath)
        trainer.strategy.barrier()

    # failures

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """This rank leaves because something failed, here or on another rank: save what is whole."""
        is_alone = session.current() is None and trainer.world_size == 1  # nobody survives anybody
        is_told = isinstance(exception, Told)
        is_ours = self.emergency and self.is_active and self._is_for_next_start(trainer)
        if self._is_off(trainer) or is_alone or is_told or not is_ours:
            super().on_exception(trainer, pl_module, exception)
            return
        self._rescue(trainer, exception)

    def _rescue(self, trainer: pl.Trainer, why: BaseException) -> bool:
        if self._store is None:
            return False  # the training has not begun
        return rescue(trainer, self._store, why, began=self.began_step, replicas=self._replicas)

    # state

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's state, and when the last save was.

        By the wall clock: a count of seconds in training would start anew with each restart from this checkpoint, and
        a run that fails more often than the interval would never save again.
        """
        return {**super().state_dict(), "saved_at": time.time()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        super().load_state_dict(state_dict)
        self._cadence.resume(time.time() - float(state_dict.get("saved_at", time.time())))


class _Purposeful:
    def __init__(self, seals: Seals | None, purpose: Purpose) -> None:
        self._seals = seals
        self._purpose = purpose

    def __enter__(self) -> None:
        if self._seals is not None:
            self._seals.purpose = self._purpose

    def __exit__(self, *_: object) -> None:
        if self._seals is not None:
            self._seals.purpose = Purpose()
