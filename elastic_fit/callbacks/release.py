"""What a worker does while its main thread can't: a thread that looks at the board.

- Release from a collective that can't end: a silent peer breaks no connection, and gloo waits for it for minutes. Where
  a device works behind its process, that is `elastic_fit.callbacks.gate`'s to do, so that no state is spoilt.
- NCCL's failures and timeouts, which its own watchdog would end the process for, state and all.
- A rescue in the main thread's place, where even that doesn't bring it back: gloo may miss the end of a connection that
  breaks just as an operation begins (seen once in a hundred kills), and a kernel of a device may never return.
- The way out of a worker that is told to stop while it waits for its peers to start: there is nothing to be saved.
- Processes that were forked to read data and never began are ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from elastic_fit.callbacks._dataloader import end_unborn
from elastic_fit.callbacks.latch import Latch
from elastic_fit.supervisor.board import Board, Phase, StopMode, Word
from elastic_fit.supervisor.exits import Exit

if TYPE_CHECKING:
    from elastic_fit.callbacks.gate import Gate

log = logging.getLogger("elastic_fit")

LOOK_S = 0.25
"""Pause between two looks at the board."""
PATIENCE_S = 0.5
"""How long this worker may take to leave by itself once it is asked to."""
STUCK_S = 2.0
"""How long the main thread must stand at one place, after its collectives were broken, to be taken for stuck."""

stand_in: Callable[[bool], bool] | None = None
"""Saves what this rank holds, in whatever thread, and says whether it did; set while a training runs.

Where it can't, it says why if told that this is the last time it is asked.
"""
gate: Gate | None = None
"""Before the optimizer's steps; set once a training runs on a device that has one."""
has_trainer = False
"""Whether the script has made a Trainer. That Lightning is imported says nothing: a warm server has it always."""
trouble: Callable[[], str | None] | None = None
"""Says why collectives have failed; set where it is ours to look, and nobody else ends this process for it."""


def watch(board: Board, latch: Latch) -> threading.Thread:
    """Start the thread."""
    thread = threading.Thread(target=_run, args=(board, latch), name="elastic-fit-release", daemon=True)
    thread.start()
    return thread


def _run(board: Board, latch: Latch) -> None:
    try:
        _act(board, latch)
    except Exception:
        log.exception("elastic-fit: the thread that hears of other ranks has failed")
        if trouble is not None:  # nobody else would hear of a collective that never ends
            _end(1)
        raise


def _act(board: Board, latch: Latch) -> None:
    why = None
    while why is None and not _is_asked_to_leave(board):
        latch.wait(LOOK_S)
        end_unborn()
        why = trouble() if trouble is not None else None
        if board.request and _waits_outside(board, latch):
            _leave_early(board, latch)
    if why is None:
        time.sleep(PATIENCE_S)
    if board.phase < Phase.RESCUING and _has_group():
        _break_off(why or "another rank has failed: leaving, so that the job can go on")
    while board.phase < Phase.RESCUING:
        if _is_stuck() and (stand_in(False) if stand_in is not None else _has_nothing_to_save(board, latch)):
            _end(1)


def _break_off(why: str) -> None:
    """Bring the main thread back from its collectives. What they have left half done must get into no state."""
    log.info("breaking the collectives: %s", why)
    if gate is not None:
        gate.close(why)
    elif _computes_on_device():
        # The device would go on with what they left: nothing that it holds then is to be saved, by anybody.
        while stand_in is None and not _is_stuck():
            pass  # a script of another kind, or one that has trained: it may be writing what it has
        log.error("elastic-fit: ending this process: %s", why)
        try:
            if stand_in is not None:
                stand_in(True)
        finally:
            _end(1)
    else:
        abort_collectives()


def _computes_on_device() -> bool:
    import torch
    import torch.distributed as dist

    return torch.cuda.is_initialized() and "nccl" in dist.get_backend_config()


def _is_asked_to_leave(board: Board) -> bool:
    return bool(board.request) and board.mode is StopMode.RESCUE


def _is_stuck() -> bool:
    """Whether the main thread stands at one place for long."""
    place = _main_thread()
    time.sleep(STUCK_S)
    return place == _main_thread()


def _has_nothing_to_save(board: Board, latch: Latch) -> bool:
    """Whether this is a Lightning worker before its first step, or after its last one is saved."""
    is_between = latch.is_in_trainer or not board[Word.FIRST_STEP_NS]
    return is_between and board.phase is not Phase.SAVING and _is_ours(latch)


def _main_thread() -> tuple[int, int]:
    """Where it stands: a frame and an instruction, which stay the same while it is inside of a native call."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return id(frame), frame.f_lasti


def _waits_outside(board: Board, latch: Latch) -> bool:
    """Whether no boundary is to come at which this worker would stop, nor anything to be saved."""
    return board.phase < Phase.PROCESS_GROUP and not latch.is_in_trainer and _is_ours(latch)


def _is_ours(latch: Latch) -> bool:
    """Whether all that this worker does is train with Lightning.

    A script of another kind, or one that handles SIGTERM itself, may have things to do before it ends.
    """
    return latch.is_installed and has_trainer


def _leave_early(board: Board, latch: Latch) -> None:
    """End a worker that waits in native code for peers that may have left, where no handler gets to run."""
    time.sleep(PATIENCE_S)
    if _waits_outside(board, latch) and not latch.is_leaving:
        board[Word.LEFT_EARLY] = 1
        _end(int(Exit.TERMINATED))


def _end(status: int) -> NoReturn:
    """End this process, whatever its threads do."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _has_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def abort_collectives() -> None:
    """Have every collective of the job fail, in whatever thread waits for one."""
    import torch.distributed as dist

    group = dist.group.WORLD
    if group is not None:
        group.abort()  # enough for NCCL; gloo lets those who wait already wait on
    store_port = int(os.environ.get("MASTER_PORT", "0"))
    for connection in _peer_connections(_ephemeral_ports(), store_port):
        with connection, contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _peer_connections(ephemeral: range, store_port: int) -> Iterator[socket.socket]:
    """TCP connections whose two ends both have a port that the system chose: those between ranks, and hardly others.

    The job's store is left alone, and so are services, which listen on ports of their own.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
            if _is_between_ranks(connection, ephemeral, store_port):
                yield connection
            else:
                connection.close()


def _is_between_ranks(connection: socket.socket, ephemeral: range, store_port: int) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return False
    try:
        near, far = connection.getsockname()[1], connection.getpeername()[1]
    except OSError:
        return False
    return near in ephemeral and far in ephemeral and far != store_port


def _ephemeral_ports() -> range:
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return range(int(first), int(last) + 1)
