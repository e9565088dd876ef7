"""Adapter to torch's DataLoader: its worker processes live through stop signals, as long as their rank needs them.

A scheduler signals every process of a job, also those that read data. torch lets them die by SIGTERM and raises in the
rank, wherever that is: a stop would find no boundary, or a rank in the middle of an optimizer step. Instead they tell
the rank's board, like the rank itself, and stay. SIGTERM is also how a DataLoader, or an interpreter at its end, gets
rid of a worker that hangs: then it still ends the worker.

Before Python 3.12 a fork may leave its child with a lock of the interpreter's that another thread (gloo's, say) held at
that moment: it never begins, and its rank would wait for its data for ever (seen once, in a run of all tests). See
`end_unborn`.

Holds for torch 2.11 to 2.13; ``tests/test_contract_lightning.py`` checks every name used here. Loaders that start
their workers by ``spawn`` or ``forkserver`` have no board to tell, and keep torch's ways.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import signal
import struct
import threading
import time
from collections.abc import Collection
from multiprocessing.synchronize import Event
from typing import Any

import psutil
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils import worker as torch_worker

from elastic_fit.callbacks.latch import Latch
from elastic_fit.supervisor.board import Board, Phase

log = logging.getLogger("elastic_fit")

START_S = 30.0
"""Who was forked to read data and has not begun for so long never will."""

_torch_loop = torch_worker._worker_loop
_torch_set_pids = signal_handling._set_worker_pids
_rank: tuple[Board, Latch] | None = None
_births: tuple[int, int] | None = None
"""A pipe: workers write their pid into it as they begin."""
_awaited: dict[int, float] = {}
"""Until when each worker that was started is to have begun, seconds on the monotonic clock."""
_begun: set[int] = set()
"""Those that have, before they were awaited."""


def keep_readers(board: Board, latch: Latch) -> None:
    """From here on, have the workers of every DataLoader of this process stay, and tell `board`."""
    global _rank, _births
    _rank = board, latch
    _births = os.pipe()
    for descriptor in _births:
        os.set_blocking(descriptor, False)
    torch_worker._worker_loop = _loop  # type: ignore[assignment]
    signal_handling._set_worker_pids = _await


def end_unborn() -> None:
    """Kill the workers that have not begun in time; torch raises in the rank then. To be called from time to time."""
    if not _awaited or _births is None:
        return
    with contextlib.suppress(BlockingIOError):
        while told := os.read(_births[0], 4096):
            _begun.update(pid for (pid,) in struct.iter_unpack("i", told))
    for pid, until in list(_awaited.items()):
        if pid in _begun or time.monotonic() > until:
            del _awaited[pid]
            if pid not in _begun and _is_own_fork(pid):
                log.warning("elastic-fit: a process that was to read data (pid %d) has never begun: killing it", pid)
                os.kill(pid, signal.SIGKILL)
            _begun.discard(pid)


def _await(key: int, child_pids: tuple[int, ...]) -> None:
    """Where a DataLoader says which workers it has started."""
    _torch_set_pids(key, child_pids)
    _awaited.update(dict.fromkeys(child_pids, time.monotonic() + START_S))


def _is_own_fork(pid: int) -> bool:
    """Whether it runs as a copy of this process: one that was spawned does not, and says nothing as it begins."""
    try:
        child = psutil.Process(pid)
        return child.ppid() == os.getpid() and child.cmdline() == psutil.Process().cmdline()
    except psutil.Error:
        return False


@functools.wraps(_torch_loop)
def _loop(*args: Any) -> None:
    """Run torch's loop in a DataLoader's worker; signals wait from here until `_Start` is ready for them."""
    if _rank is not None and _births is not None:
        with contextlib.suppress(BlockingIOError):
            os.write(_births[1], struct.pack("i", os.getpid()))
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
