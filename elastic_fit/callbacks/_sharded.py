"""Adapter to sharded states: how DTensors are laid out, and the files of torch.distributed.checkpoint.

Holds for Lightning 2.6 and torch 2.11 to 2.13; ``tests/test_contract_lightning.py`` checks every name used here.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import FileSystemWriter, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from elastic_fit.supervisor.errors import StorageError

METADATA = ".metadata"
"""What torch calls the index of a folder of shards; that of one rank alone has the rank before it."""
REST = "meta.pt"
"""What Lightning calls the part of a checkpoint that is neither a parameter nor an optimizer's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How some of the parameters are laid out."""

    ranks: np.ndarray
    """The mesh: global ranks."""
    divides: tuple[bool, ...]
    """Which of the mesh's dimensions divide a tensor; along the others, ranks hold the same."""
    groups: tuple[ProcessGroup, ...] = ()
    """Of this rank, one along each dimension that divides a tensor."""


def captures_own_shards(strategy: Strategy) -> bool:
    """Whether each rank captures its own shards, without a collective, and saves them in files of its own."""
    return type(strategy) is ModelParallelStrategy and strategy._save_distributed_checkpoint


def layouts(module: torch.nn.Module) -> list[Layout]:
    """How the parameters are laid out."""
    found: dict[Any, Layout] = {}
    # A module's own parameters may be whole for a while, as they are for a forward pass; those of its state never are.
    for tensor in get_model_state_dict(module).values():
        if isinstance(tensor, DTensor):
            mesh, divides = tensor.device_mesh, tuple(not placement.is_replicate() for placement in tensor.placements)
            groups = tuple(mesh.get_group(dimension) for dimension, is_counted in enumerate(divides) if is_counted)
            found.setdefault((mesh, divides), Layout(ranks=mesh.mesh.numpy(), divides=divides, groups=groups))
    return list(found.values())


def names_in_state(module: torch.nn.Module) -> set[str]:
    """What a checkpoint of this module holds."""
    return set(get_model_state_dict(module))


def name_in_state(path: str) -> str:
    """What a checkpoint calls a tensor: ``torch.compile`` and checkpointed activations wrap modules, and don't show."""
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        path = path.replace(wrapper, "")
    return path


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor is on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divide(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a captured state Lightning writes as shards, by the names that it reads them by, and the rest."""
    rest = dict(checkpoint)
    shards = {"state_dict": rest.pop("state_dict")}
    shards.update({f"optimizer_{number}": state for number, state in enumerate(rest.pop("optimizer_states", []))})
    return shards, rest


def write_shards(shards: dict[str, Any], path: str, rank: int) -> None:
    """Write what this rank holds below `path`, and an index of it; not collective."""
    writer, planner = FileSystemWriter(path), DefaultSavePlanner()
    planner.set_up_planner(shards, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True, rank=rank, use_collectives=False)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    written = writer.write_data(planner.finish_plan(plans[0]), planner)
    written.wait()
    writer.finish(metadata, [written.value()])


def read_index(path: Path) -> Metadata:
    """The index that a rank has written."""
    with path.open("rb") as file:
        return cast(Metadata, pickle.load(file))


def merge(indexes: Sequence[Metadata]) -> Metadata:
    """One index of several ranks' shards. Raises StorageError where they leave a part of a tensor out."""
    tensors: dict[str, Any] = {}
    for index in indexes:
        for name, one in index.state_dict_metadata.items():
            if not isinstance(one, TensorStorageMetadata):
                tensors.setdefault(name, one)
                continue
            chunks = tensors.setdefault(name, replace(one, chunks=[])).chunks
            chunks.extend(chunk for chunk in one.chunks if chunk not in chunks)
    for name, one in tensors.items():
        if isinstance(one, TensorStorageMetadata) and not _is_filled(one):
            raise StorageError(f"the shards that were saved leave a part of {name} out")
    return replace(
        indexes[0],
        state_dict_metadata=tensors,
        planner_data={name: path for index in reversed(indexes) for name, path in index.planner_data.items()},
        storage_data={where: file for index in reversed(indexes) for where, file in index.storage_data.items()},
    )


def _is_filled(tensor: TensorStorageMetadata) -> bool:
    """Whether chunks that don't overlap, as shards don't, fill the tensor."""
    return sum(math.prod(chunk.sizes) for chunk in tensor.chunks) == math.prod(tensor.size)
