"""Adapter to Lightning's results, where ``self.log`` keeps what it was given: the only module that touches them.

Holds for Lightning 2.6; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torchmetrics import Metric

from elastic_fit.callbacks.tally import Reduction, Tally


@dataclass(frozen=True, slots=True)
class _Result:
    """The tensors of one result, which Lightning replaces and never changes before the epoch's end."""

    meta: _Metadata
    value: torch.Tensor | None
    """None where it is an object of torchmetrics."""
    count: torch.Tensor | None
    last: torch.Tensor | None


Results = Mapping[str, _Result]
"""By Lightning's key."""


def of_epoch(trainer: pl.Trainer) -> Results:
    """What this rank has logged in the training epoch under way. No number is read, so no device is waited for.

    Not among it: what is reduced over a group of its own.
    """
    return {
        key: _Result(
            result.meta,
            result.value if result.is_tensor else None,
            result.cumulated_batch_size if _is_mean(result) else None,
            result._forward_cache,
        )
        for key, result in trainer.fit_loop.epoch_loop._results.items()
        if not result.has_reset and result.meta.sync.group is None
    }


def _is_mean(result: _ResultMetric) -> bool:
    return result.is_tensor and result.meta.is_mean_reduction


def tallies(results: Results) -> Iterator[Tally]:
    """The same as plain numbers."""
    for result in results.values():
        meta = result.meta
        yield Tally(
            fx=meta.fx,
            name=meta.name,
            reduction=cast(Reduction, meta.reduce_fx.__name__),
            dtype=str(result.value.dtype).removeprefix("torch.") if result.value is not None else "",
            value=result.value.item() if result.value is not None else 0.0,
            count=result.count.item() if result.count is not None else 0,
            last=result.last.item() if result.last is not None and result.value is not None else None,
            on_step=meta.on_step,
            on_epoch=meta.on_epoch,
            prog_bar=meta.prog_bar,
            logger=meta.logger,
            enable_graph=meta.enable_graph,
            add_dataloader_idx=meta.add_dataloader_idx,
            synced=meta.sync.should and not meta.sync.rank_zero_only,
            rank_zero_only=meta.sync.rank_zero_only,
            metric=meta.metric_attribute if result.value is None else None,
        )


def put_back(trainer: pl.Trainer, shares: Mapping[str, Tally]) -> None:
    """Have the epoch under way go on with these tallies.

    They are there at once, for what is never logged again in this epoch. The first time that one is logged, it is made
    anew by what the script says of it now, which another number of ranks may change, and the tally is added.
    """
    results = trainer.fit_loop.epoch_loop._results
    metrics = {path for path, part in trainer.lightning_module.named_modules() if isinstance(part, Metric)}
    shares = {key: tally for key, tally in shares.items() if tally.metric is None or tally.metric in metrics}
    for key, tally in shares.items():
        results[key] = _result(trainer, tally)
    # Lightning resets what the epoch's first batch logs, which is behind us.
    trainer._logger_connector._first_loop_iter = True
    waiting = set(shares)

    def log(fx: str, name: str, *args: Any, **options: Any) -> None:
        key = f"{fx}.{name}"
        before = results.pop(key) if key in waiting else None
        _ResultCollection.log(results, fx, name, *args, **options)
        if before is not None:
            waiting.discard(key)
            if not before.has_reset:  # by the epoch's end
                _add(results[key], before)
        if not waiting:
            take_up_no_more(trainer)

    results.log = log


def take_up_no_more(trainer: pl.Trainer) -> None:
    """Leave the results as they were."""
    vars(trainer.fit_loop.epoch_loop._results).pop("log", None)


def put_back_metrics(trainer: pl.Trainer, metrics: Mapping[str, torch.Tensor]) -> None:
    """What callbacks and schedulers see until it is logged again."""
    trainer._logger_connector._callback_metrics.update(metrics)


def _result(trainer: pl.Trainer, tally: Tally) -> _ResultMetric:
    meta = _Metadata(
        fx=tally.fx,
        name=tally.name,
        prog_bar=tally.prog_bar,
        logger=tally.logger,
        on_step=tally.on_step,
        on_epoch=tally.on_epoch,
        reduce_fx=getattr(torch, tally.reduction),
        enable_graph=tally.enable_graph,
        add_dataloader_idx=tally.add_dataloader_idx,
        metric_attribute=tally.metric,
    )
    meta.sync = _Sync(
        fn=trainer.strategy.reduce,
        _should=tally.synced and trainer._accelerator_connector.is_distributed,
        rank_zero_only=tally.rank_zero_only,
    )
    if tally.metric is not None:
        result = _ResultMetric(meta, is_tensor=False)
        result.value = trainer.lightning_module.get_submodule(tally.metric)
        result._update_count = 1
        return result
    device = trainer.strategy.root_device
    result = _ResultMetric(meta, is_tensor=True).to(device)
    result.value = torch.tensor(tally.value, dtype=getattr(torch, tally.dtype), device=device)
    if _is_mean(result):
        result.cumulated_batch_size = torch.tensor(tally.count, device=device)
    if tally.last is not None:
        result._forward_cache = torch.tensor(tally.last, dtype=result.value.dtype, device=device)
    result._update_count = 1  # it is computed where nothing is added, and would warn that it is empty
    return result


def _add(result: _ResultMetric, before: _ResultMetric) -> None:
    """What this result would be, had it been there before its first value."""
    if not (result.is_tensor and result.meta.on_epoch and result.meta.reduce_fx is before.meta.reduce_fx):
        return
    value = before.value.to(result.value.device)
    if result.meta.is_max_reduction or result.meta.is_min_reduction:
        result.value = result.meta.reduce_fx(value, result.value)
        return
    result.value = value + result.value
    if _is_mean(result):
        result.cumulated_batch_size = before.cumulated_batch_size.to(value.device) + result.cumulated_batch_size
