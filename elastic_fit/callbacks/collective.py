"""The one collective of our own: small objects, gathered from all ranks."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(mine: T) -> list[T]:
    """Every rank's object, by rank, on every rank; collective. Alone, or without a process group: just this one."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everybodys: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everybodys, mine)
    return everybodys
