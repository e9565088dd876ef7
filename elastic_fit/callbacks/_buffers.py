"""Adapter to the buffers of modules, and to what DDP does to them.

Holds for Lightning 2.6 and torch 2.11 to 2.13; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from elastic_fit.callbacks import _sharded

Place = tuple[dict[str, torch.Tensor], str]
"""A module's own dictionary of buffers, and a name in it."""


def persistent_buffers(trainer: pl.Trainer) -> dict[str, Place]:
    """The buffers that a checkpoint holds, by their names there: where each of them is.

    None where a strategy puts its checkpoints together in a way of its own.
    """
    module, strategy = trainer.lightning_module, trainer.strategy
    if _sharded.captures_own_shards(strategy):
        saved = _sharded.names_in_state(module)
        named = ((_sharded.name_in_state(path), place) for path, place in _places_in(module))
        return {name: place for name, place in named if name in saved}
    if type(strategy) not in (DDPStrategy, SingleDeviceStrategy):
        return {}
    state = strategy.lightning_module_state_dict()
    return {
        path: (buffers, own)
        for path, (buffers, own) in _places_in(module)
        if path in state and state[path].data_ptr() == buffers[own].data_ptr()
    }


def _places_in(module: torch.nn.Module) -> Iterator[tuple[str, Place]]:
    for path, one in module.named_modules():
        for own, _ in one.named_buffers(recurse=False):
            yield f"{path}.{own}" if path else own, (cast(dict[str, torch.Tensor], one._buffers), own)


def call_before_forward(trainer: pl.Trainer, act: Callable[[], None]) -> bool:
    """Have DDP call `act` in each forward pass, once it has made the ranks' buffers equal; False without DDP."""
    model: Any = trainer.strategy.model
    if not isinstance(model, DistributedDataParallel):
        return False
    run: Callable[..., Any] = model._run_ddp_forward

    def run_ours(*args: Any, **kwargs: Any) -> Any:
        act()
        return run(*args, **kwargs)

    vars(model)["_run_ddp_forward"] = run_ours
    return True


def amend_state(trainer: pl.Trainer, amend: Callable[[dict[str, Any]], dict[str, Any]] | None) -> None:
    """Have `amend` look over the model's state whenever it is captured; None for nobody."""
    vars(trainer.strategy).pop("lightning_module_state_dict", None)
    capture_state = trainer.strategy.lightning_module_state_dict
    if amend is not None:
        vars(trainer.strategy)["lightning_module_state_dict"] = lambda: amend(capture_state())


def copy_all(tensors: list[torch.Tensor], to: list[torch.Tensor]) -> None:
    """Copy them, in as few steps as the device allows."""
    with torch.no_grad():
        torch._foreach_copy_([_sharded.own_part(one) for one in to], [_sharded.own_part(one) for one in tensors])
