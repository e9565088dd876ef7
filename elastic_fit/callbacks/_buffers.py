"""Adapter to the buffers of modules, and to what DDP does to them.

Holds for Lightning 2.6 and torch 2.10 to 2.13; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from elastic_fit.callbacks._sharded import captures_own_shards

Place = tuple[dict[str, torch.Tensor], str]
"""A module's own dictionary of buffers, and a name in it."""


def persistent_buffers(trainer: pl.Trainer) -> dict[str, Place]:
    """The buffers that a checkpoint holds, by their names there: where each of them is.

    None where a strategy puts its checkpoints together in a way of its own.
    """
    is_sharded = captures_own_shards(trainer.strategy)
    if type(trainer.strategy) not in (DDPStrategy, SingleDeviceStrategy) and not is_sharded:
        return {}
    saved = trainer.strategy.lightning_module_state_dict()
    return {
        name: (cast(dict[str, torch.Tensor], module._buffers), own)
        for path, module in trainer.lightning_module.named_modules()
        for own, buffer in module.named_buffers(recurse=False)
        if (name := f"{path}.{own}" if path else own) in saved
        # Sharded states are copies.
        and (is_sharded or saved[name].data_ptr() == buffer.data_ptr())
    }


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
        torch._foreach_copy_(to, tensors)
