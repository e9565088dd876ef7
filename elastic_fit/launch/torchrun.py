"""The entry point ``torchrun.handlers``: what makes ``torchrun --rdzv-backend elastic-fit`` known to torch.

torch loads this module whenever its rendezvous package is imported, in whatever process: nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousParameters


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torch asks the entry point for: the function that makes the rendezvous handler."""
    return _create


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    from elastic_fit.launch.foreign import ForeignRendezvous

    return ForeignRendezvous.of(parameters)
