"""In the agent's place, where there is no launcher: a thread that spreads a stop over the process group's store."""

from __future__ import annotations

import atexit
import logging
import os
import threading

from elastic_fit.callbacks import _lightning
from elastic_fit.callbacks._dataloader import end_unborn, keep_readers
from elastic_fit.callbacks.latch import Latch
from elastic_fit.callbacks.notice import NOTICES
from elastic_fit.supervisor.agreement import STOP_KEY
from elastic_fit.supervisor.board import Board, Phase, StopMode, Word
from elastic_fit.supervisor.stop import asker

log = logging.getLogger("elastic_fit")

LOOK_S = 0.1
"""Pause between two looks."""
END_S = 1.0
"""How long the end of the process waits for the thread."""
WANTED_KEY = f"{STOP_KEY}/wanted"


def begin() -> tuple[Board, Latch]:
    """Make a board and a latch of this process's own, and start the thread that answers on the board."""
    board, descriptor = Board.anonymous()
    os.close(descriptor)
    latch = Latch(board)
    ended = threading.Event()
    thread = threading.Thread(target=_answer, args=(board, latch, ended), name="elastic-fit-stop", daemon=True)
    thread.start()
    NOTICES.listen(board)
    keep_readers(board, latch)
    atexit.register(_end, board, os.getpid(), thread, ended)
    return board, latch


def _end(board: Board, pid: int, thread: threading.Thread, ended: threading.Event) -> None:
    """From here on the interpreter ends what reads data; a fork of this process that ends says nothing of it.

    It also ends threads as they come back from native code, and where that is the store's, the process aborts.
    """
    if os.getpid() == pid:
        board.enter(Phase.DONE)
        ended.set()
        thread.join(END_S)


def _answer(board: Board, latch: Latch, ended: threading.Event) -> None:
    """Wait for a request, here or on another rank, and put it up where the training loop reads it."""
    store: _lightning.Store | None = None
    while not ended.is_set():
        latch.wait(LOOK_S)
        end_unborn()
        why = asker(board[Word.SIGNALLED])
        try:
            store = store or _lightning.own_connection()
            if store is not None and why:
                store.set(WANTED_KEY, why)
            elif store is not None and store.check([WANTED_KEY]):
                why = "another rank was asked"
        except RuntimeError:
            store = None  # the process group has ended; there may be another one
        if why:
            log.warning("elastic-fit: stopping (%s)", why)
            board.ask(1, StopMode.SAVE)
            return
