"""Adapter to torch's DataLoader: its worker processes live through stop signals, as long as their rank needs them.

A scheduler signals every process of a job, also those that read data. torch lets them die by SIGTERM and raises in the
rank, wherever that is: a stop would find no boundary, or a rank in the middle of an optimizer step. Instead they tell
the rank's board, like the rank itself, and stay. SIGTERM is also how a DataLoader, or an interpreter at its end, gets
rid of a worker that hangs: then it still ends the worker.

Holds for torch 2.10 to 2.13; ``tests/test_contract_lightning.py`` checks every name used here. Loaders that start
their workers by ``spawn`` or ``forkserver`` have no board to tell, and keep torch's ways.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import threading
from collections.abc import Collection
from multiprocessing.synchronize import Event
from typing import Any

from torch.utils.data._utils import worker as torch_worker

from elastic_fit.callbacks.latch import Latch
from elastic_fit.supervisor.board import Board, Phase

_torch_loop = torch_worker._worker_loop
_rank: tuple[Board, Latch] | None = None


def keep_readers(board: Board, latch: Latch) -> None:
    """From here on, have the workers of every DataLoader of this process stay, and tell `board`."""
    global _rank
    _rank = board, latch
    torch_worker._worker_loop = _loop  # type: ignore[assignment]


@functools.wraps(_torch_loop)
def _loop(*args: Any) -> None:
    """Run torch's loop in a DataLoader's worker; signals wait from here until `_Start` is ready for them."""
    if _rank is not None:
        board, latch = _rank
        found = inspect.signature(_torch_loop).bind(*args)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, *latch.latched_before_fork})
        found.arguments["init_fn"] = _Start(
            board, latch.latched_before_fork, found.arguments["done_event"], found.arguments["init_fn"]
        )
        args = found.args
    _torch_loop(*args)


class _Start:
    """A ``worker_init_fn``: torch has set its own handlers by then.

    Args:
        board: the rank's.
        latched: the signals that the rank latches; a script's own meaning of the others is left alone.
        done: set where the DataLoader wants its workers to end.
        then: the script's own, if it has one.
    """

    def __init__(self, board: Board, latched: Collection[int], done: Event, then: Any) -> None:
        self._board = board
        self._latched = latched
        self._done = done
        self._then = then

    def __call__(self, worker_id: int) -> None:
        if self._latched:
            self._hear(self._latched)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, *self._latched})
        if self._then is not None:
            self._then(worker_id)

    def _hear(self, latched: Collection[int]) -> None:
        # Python writes the number as the signal arrives, also while the main thread hangs in native code.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in latched:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._answer, args=(reader, latched), name="elastic-fit-reader", daemon=True).start()

    def _answer(self, reader: int, latched: Collection[int]) -> None:
        while arrived := os.read(reader, 1):
            number = arrived[0]
            if number == signal.SIGTERM and (self._done.is_set() or self._board.phase is Phase.DONE):
                os._exit(0)
            if number in latched:
                self._board.ask_back(number)
