"""The one collective of our own: small objects, gathered from all ranks. And who does without."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_this_thread = threading.local()
"""A rescue may have a thread of its own."""


def gather(mine: T) -> list[T]:
    """Every rank's object, by rank, on every rank; collective. Alone, or without a process group: just this one."""
    if is_saving_alone() or not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everybodys: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everybodys, mine)
    return everybodys


@contextlib.contextmanager
def saving_alone() -> Iterator[None]:
    """Meanwhile no other rank is asked for anything: a survivor saves without collectives."""
    before = is_saving_alone()
    _this_thread.is_alone = True
    try:
        yield
    finally:
        _this_thread.is_alone = before


def is_saving_alone() -> bool:
    """Whether this rank is a survivor that saves what it holds."""
    return getattr(_this_thread, "is_alone", False)
