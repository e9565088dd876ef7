"""Loggers that go on with the same files after a restart: no step twice, none left out.

A restart goes on from a checkpoint, so what was logged after it will be logged again, and what was about to be logged
when it was written (Lightning logs a step's metrics after the hooks that save) would never be. So a checkpoint holds
the last optimizer step's rows, and a restart cuts the files off before that step and writes its rows once more.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger

from elastic_fit.callbacks import _lightning, _loggers
from elastic_fit.callbacks.collective import is_saving_alone

RECORD = "loggers.json"
"""Beside a fit's checkpoints: which version of each logger's files belongs to it."""
Row = tuple[int, dict[str, Any]]
"""A step and what was logged at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerFiles:
    """Where a logger writes."""

    kind: str
    save_dir: str
    name: str
    version: str | int | None = None

    @classmethod
    def of(cls, logger: Logger, *, with_version: bool) -> LoggerFiles:
        """Of a logger; asking for its version settles it."""
        version = logger.version if with_version else None
        return cls(kind=type(logger).__name__, save_dir=str(logger.save_dir), name=str(logger.name), version=version)

    def is_same_place(self, other: LoggerFiles) -> bool:
        """But for the version."""
        return (self.kind, self.save_dir, self.name) == (other.kind, other.save_dir, other.name)


def pin(loggers: Sequence[Logger], folder: Path) -> list[bool]:
    """Have loggers that keep files write to those that this fit began with; returns which ones now do.

    To be called before Lightning asks them where they write. The files stay as they are until training starts.
    """
    try:
        known = [LoggerFiles(**one) for one in json.loads((folder / RECORD).read_text())]
    except FileNotFoundError:
        known = []
    return [_pin(logger, known) for logger in loggers]


def pin_late(loggers: Sequence[Logger], folder: Path) -> list[bool]:
    """The same where Lightning has asked already: what the loggers have begun in the meantime is taken back."""
    for logger in loggers:
        if _loggers.keeps_files(logger):
            _loggers.take_back_new_version(logger)
    return pin(loggers, folder)


def _pin(logger: Logger, known: Sequence[LoggerFiles]) -> bool:
    if not _loggers.keeps_files(logger):
        return False
    place = LoggerFiles.of(logger, with_version=False)
    version = next((one.version for one in known if one.is_same_place(place)), None)
    return version is not None and _loggers.write_to_version(logger, version)


class ContinuedLoggers(pl.Callback):
    """Keeps the last optimizer step's rows in checkpoints, and has pinned loggers go on after them.

    Args:
        folder: of this fit's checkpoints; None where it is remote, and loggers begin new versions.
        pinned: which of the trainer's loggers write to the files of an earlier attempt.
    """

    def __init__(self, folder: Path | None, pinned: Sequence[bool]) -> None:
        self._folder = folder
        self._pinned = pinned
        self._trainer: pl.Trainer | None = None
        self._step = -1
        self._rows: list[list[Row]] = []
        self._is_restored = False

    @property
    def state_key(self) -> str:
        """Constant."""
        return "elastic_fit.ContinuedLoggers"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to what is logged, and write down where."""
        if stage != "fit":
            return
        self._trainer = trainer
        self._rows = [[] for _ in trainer.loggers]
        for logger, rows in zip(trainer.loggers, self._rows, strict=True):
            logger.log_metrics = self._listening(logger.log_metrics, rows)  # type: ignore[method-assign]
        if trainer.is_global_zero and trainer.loggers and self._folder is not None:
            files = [LoggerFiles.of(one, with_version=True) for one in trainer.loggers if _loggers.keeps_files(one)]
            _publish(self._folder / RECORD, json.dumps([asdict(one) for one in files], indent=1))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the loggers as they were."""
        if stage == "fit":
            for logger in trainer.loggers:
                vars(logger).pop("log_metrics", None)

    def _listening(self, log_metrics: Any, rows: list[Row]) -> Any:
        @functools.wraps(log_metrics)
        def log_and_keep(metrics: dict[str, Any], step: int | None = None) -> None:
            if step is not None:
                rows[:] = [row for row in rows if row[0] >= self._step]
                rows.append((step, _plain(metrics)))
            log_metrics(metrics, step)

        return log_and_keep

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's own count of logged steps is off by one after some restarts."""
        if self._is_restored:
            self._is_restored = False
            _loggers.number_log_steps(trainer, self._step + 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember what the loggers call the last optimizer step."""
        if _lightning.is_boundary(trainer):
            self._step = _loggers.log_step(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The rows of the last optimizer step, those that are about to be logged included."""
        trainer = self._trainer
        if trainer is None:
            return {}
        pending = _loggers.row_to_come(trainer, may_ask_others=not is_saving_alone())
        step = self._step if pending is None else pending[0]
        rows = [[list(row) for row in mine if row[0] == step] for mine in self._rows]
        if pending is not None and pending[1]:
            rows = [[*mine, [step, _plain(pending[1])]] for mine in rows]
        return {"step": step, "rows": rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To be written when training starts."""
        self._step = int(state_dict.get("step", -1))
        self._is_restored = True
        for mine, saved in zip(self._rows, state_dict.get("rows", []), strict=False):
            mine[:] = [(int(step), dict(metrics)) for step, metrics in saved]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut the pinned loggers' files off where the checkpoint was written, and write that step's rows."""
        for logger, is_pinned, rows in zip(trainer.loggers, self._pinned, self._rows, strict=True):
            if is_pinned and trainer.is_global_zero:
                _loggers.continue_log(logger, self._step, list(rows))


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    values = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in metrics.items()}
    return {name: value for name, value in values.items() if isinstance(value, (int, float, str))}


def _publish(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
