"""Adapter to Lightning's loggers: with ``_lightning`` the only module of this room that touches its private names.

Holds for Lightning 2.6; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

import contextlib
import csv
from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from elastic_fit.callbacks._lightning import is_at_epoch_end, is_boundary


def number_log_steps(trainer: pl.Trainer, step: int) -> None:
    """Have loggers be given `step` for the batch under way."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def log_step(trainer: pl.Trainer) -> int:
    """The step that loggers are given for the batch under way."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def row_to_come(trainer: pl.Trainer, *, may_ask_others: bool) -> tuple[int, dict[str, Any]] | None:
    """What Lightning logs as soon as the hooks that are being called have returned: its step and its metrics.

    The metrics of an epoch may have to be reduced over all ranks; without `may_ask_others` they are left out.
    """
    connector, step = trainer._logger_connector, log_step(trainer)
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if is_at_epoch_end(trainer) and connector._first_loop_iter is None:
        metrics, step = connector.metrics["log"] if may_ask_others else {}, step - 1
    elif progress.processed == progress.completed + 1 and is_boundary(trainer) and trainer.training:
        metrics = connector.metrics["log"] if connector.should_update_logs else {}
    else:
        return None
    row = dict(metrics)
    given = row.pop("step", None)
    if not row:
        return step, {}
    return (int(given), row) if given is not None else (step, {"epoch": trainer.current_epoch, **row})


def keeps_files(logger: Logger) -> bool:
    """Whether a logger writes numbered versions of files that we know how to go on with."""
    return isinstance(logger, (CSVLogger, TensorBoardLogger))


class _KeptWriter(ExperimentWriter):
    """Lightning's writer of metrics.csv, which would delete the file that it finds."""

    def _check_log_dir_exists(self) -> None:
        """What is there belongs to this run."""


def write_to_version(logger: Logger, version: int | str) -> bool:
    """Have a logger that has written nothing yet go on in `version`; False where it was told to use another one."""
    assert isinstance(logger, (CSVLogger, TensorBoardLogger))
    if logger._version not in (None, version):
        return False
    logger._version = version
    if isinstance(logger, CSVLogger) and getattr(rank_zero_only, "rank", 0) == 0:
        logger._experiment = _KeptWriter(log_dir=logger.log_dir)
    return True


def take_back_new_version(logger: Logger) -> None:
    """Undo what a logger did when it was asked for its experiment: its next version has no contents yet."""
    assert isinstance(logger, (CSVLogger, TensorBoardLogger))
    folder = Path(logger.log_dir)
    if logger._experiment is not None:
        if isinstance(logger, TensorBoardLogger):
            logger._experiment.close()
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        with contextlib.suppress(OSError):  # the script keeps something of its own there
            folder.rmdir()
        logger._experiment = None
    logger._version = None


def continue_log(logger: Logger, step: int, rows: list[tuple[int, dict[str, Any]]]) -> None:
    """Forget what was logged from `step` on, and log its `rows`."""
    if isinstance(logger, CSVLogger):
        rows = _cut_csv(logger, step, rows)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.close()
        logger._experiment = None
        logger._kwargs["purge_step"] = max(0, step)  # TensorBoard hides what earlier files hold from there on
    for at, metrics in rows:
        logger.log_metrics(metrics, at)
    logger.save()


def _cut_csv(logger: CSVLogger, step: int, rows: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """Cut the file off before `step`; returns the rows to be written after that: where the file has them, its own."""
    writer: Any = logger.experiment
    path = Path(writer.metrics_file_path)
    if not path.exists():
        return rows
    with path.open(newline="") as file:
        found = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file) if row["step"]]
    kept = [row for row in found if int(row["step"]) < step]
    mine: dict[frozenset[str], deque[dict[str, Any]]] = {}  # several may have the same columns: in order
    for row in found:
        if int(row["step"]) == step:
            mine.setdefault(frozenset(row) - {"step"}, deque()).append(row)
    writer.metrics, writer.metrics_keys = [], sorted({name for row in kept for name in row})
    temporary = path.with_suffix(".cut")
    with temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, writer.metrics_keys)
        table.writeheader()
        table.writerows(kept)
    temporary.replace(path)
    if not kept:
        path.unlink()
    as_written = [(at, own.popleft() if (own := mine.get(frozenset(metrics))) else metrics) for at, metrics in rows]
    return [(at, {name: cell for name, cell in metrics.items() if name != "step"}) for at, metrics in as_written]
