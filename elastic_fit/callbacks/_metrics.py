"""Adapter to torchmetrics: the state of the metrics that a module keeps, which Lightning leaves out of checkpoints.

Holds for torchmetrics 1.9; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torchmetrics import Metric

LARGEST = 65_536
"""Numbers that a metric may keep: a copy is made at each optimizer step. Those that keep all they saw aren't kept."""
States = Mapping[str, tuple[int, dict[str, torch.Tensor]]]
"""How often a metric was updated and its tensors, by its place in the module."""


class Metrics:
    """The metrics of a module; none without one."""

    def __init__(self, module: pl.LightningModule | None = None) -> None:
        parts = module.named_modules() if module is not None else ()
        self._metrics = {path: part for path, part in parts if isinstance(part, Metric)}

    def states(self) -> States:
        """A copy of what those that were updated hold now."""
        updated = [(path, one, _tensors(one)) for path, one in self._metrics.items() if one._update_count]
        return {
            path: (metric._update_count, {name: tensor.detach().clone() for name, tensor in tensors.items()})
            for path, metric, tensors in updated
            if tensors is not None
        }

    def put_back(self, states: Mapping[str, Any]) -> None:
        """Go on with what `plain` made of such a copy."""
        for path, (count, saved) in states.items():
            metric = self._metrics.get(path)
            if metric is None or set(saved) != set(metric.metric_state):
                continue  # the script keeps another one there now
            for name, (dtype, numbers) in saved.items():
                value = torch.tensor(numbers, dtype=getattr(torch, dtype), device=metric.device)
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, None


def plain(states: States) -> dict[str, Any]:
    """The same as plain numbers."""
    return {
        path: (
            count,
            {name: (str(value.dtype).removeprefix("torch."), value.tolist()) for name, value in tensors.items()},
        )
        for path, (count, tensors) in states.items()
    }


def _tensors(metric: Metric) -> dict[str, torch.Tensor] | None:
    """The state of a metric; None where it is a list, which grows with what it has seen, or large."""
    tensors = {name: value for name, value in metric.metric_state.items() if isinstance(value, torch.Tensor)}
    is_whole = len(tensors) == len(metric.metric_state)
    return tensors if is_whole and sum(tensor.numel() for tensor in tensors.values()) <= LARGEST else None
