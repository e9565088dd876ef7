"""The one collective of our own: small objects, gathered from all ranks. And who does without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_alone = False


def gather(mine: T) -> list[T]:
    """Every rank's object, by rank, on every rank; collective. Alone, or without a process group: just this one."""
    if _alone or not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everybodys: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everybodys, mine)
    return everybodys


@contextlib.contextmanager
def saving_alone() -> Iterator[None]:
    """Meanwhile no other rank is asked for anything: a survivor saves without collectives."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def is_saving_alone() -> bool:
    """Whether this rank is a survivor that saves what it holds."""
    return _alone
