"""Adapter to NCCL's process groups: who deals with their failures, and how all of them are broken at once.

Holds for torch 2.11 to 2.13; ``tests/test_contract_lightning.py`` checks the names used here, as far as a torch without
NCCL has them, and ``tests/gpu`` what they do.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from torch.distributed import distributed_c10d

HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
BY_TORCH = "1"
"""Its watchdog ends the process: what torchrun sets, and so the launcher, unless the user has chosen."""
BY_NOBODY = "0"


def leave_failures_to_us() -> bool:
    """Have torch's watchdog end no process, and break no collective, of groups that are made from here on.

    It would do either soon after it has heard of a peer's death. False where the user has chosen what it is to do,
    or there are groups already: torch has looked when they were made.
    """
    chosen = os.environ.get(HANDLING, BY_TORCH)
    if chosen not in (BY_TORCH, BY_NOBODY) or (chosen == BY_TORCH and _backends()):
        return False
    os.environ[HANDLING] = BY_NOBODY
    return True


def failure() -> str | None:
    """What the watchdog has found: a collective that has failed, or one that takes longer than its group's timeout."""
    for backend in _backends():
        if (error := backend.get_error().name) != "SUCCESS":
            return f"NCCL error: a collective has failed ({error})"
    return None


def abort() -> None:
    """Break the collectives of all groups; those that are queued are over at once, with anything as their result.

    All at the same time: one that is whole doesn't end before the device has come to the end of its queue, in which a
    collective of another group hangs.
    """
    backends = _backends()
    if not backends:
        return
    # At the end of the process Lightning would wait for the watchdogs, which write down at length what has failed.
    atexit.unregister(_destroy_dist_connection)
    aborts = [threading.Thread(target=backend.abort, daemon=True) for backend in backends]
    for one in aborts:
        one.start()
    for one in aborts:
        one.join()


def _backends() -> list[Any]:
    nccl = getattr(distributed_c10d, "ProcessGroupNCCL", None)
    if nccl is None:
        return []
    found = []
    for group in list(distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # it has none for such devices
            found.append(group._get_backend(torch.device("cuda")))
    # With TORCH_DISTRIBUTED_DEBUG=DETAIL each is wrapped.
    found = [getattr(backend, "wrapped_pg", backend) for backend in found]
    return [backend for backend in found if isinstance(backend, nccl)]
