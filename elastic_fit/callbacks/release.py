"""Release from a collective that can't end: a silent peer breaks no connection, and gloo waits for it for minutes."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from elastic_fit.supervisor.board import Board, Phase, StopMode

log = logging.getLogger("elastic_fit")

LOOK_S = 0.25
"""Pause between two looks at the board."""
PATIENCE_S = 0.5
"""How long this worker may take to leave by itself once it is asked to."""


def watch(board: Board) -> threading.Thread:
    """Start the thread that breaks this worker's collectives when it is asked to leave and doesn't.

    The main thread then gets an error out of the collective that it waits in, and rescues what it holds.
    """
    thread = threading.Thread(target=_run, args=(board, threading.Event()), name="elastic-fit-release", daemon=True)
    thread.start()
    return thread


def _run(board: Board, pause: threading.Event) -> None:
    while not _is_asked_to_leave(board):
        pause.wait(LOOK_S)
    pause.wait(PATIENCE_S)
    if board.phase is not Phase.RESCUING and dist.is_available() and dist.is_initialized():
        log.info("another rank is gone: breaking the collectives that wait for it")
        abort_collectives()


def _is_asked_to_leave(board: Board) -> bool:
    return bool(board.request) and board.mode is StopMode.RESCUE


def abort_collectives() -> None:
    """Have every collective of the job fail, in whatever thread waits for one."""
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
