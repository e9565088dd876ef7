"""Where this node hears that the job is to stop: signals, its workers, files, and what `elastic-fit stop` leaves."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from elastic_fit.supervisor.board import NOTICED, Board, Word
from elastic_fit.supervisor.stop import StopRequest, asker

LOOK_S = 0.5
"""Pause between two looks at the files."""


class Latch(Protocol):
    """Signals that have arrived, to be looked at when the loop gets to it."""

    def fileno(self) -> int:
        """Readable when a signal is waiting."""

    def take(self) -> list[int]:
        """The signals since the last call, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What ``elastic-fit stop`` leaves in the run folder for the launchers."""

    id: str
    by: str
    """Who asks, in words."""
    save: bool = True

    @classmethod
    def by_this_user(cls, *, save: bool) -> Order:
        """An order of the caller's."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's uid that has no name
            user = str(os.getuid())
        return cls(id=secrets.token_hex(4), by=f"elastic-fit stop by {user}@{socket.gethostname()}", save=save)

    def leave(self, path: Path) -> None:
        """Put it where the launchers look; replaces one that is there."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{self.id}")
        temporary.write_text(json.dumps(asdict(self)))
        os.rename(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Order | None:
        """What is there; a file that somebody has made by hand is an order to save and stop.

        None where it is gone: the run has ended on another node.
        """
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        try:
            record = json.loads(text)
            return cls(id=str(record["id"]), by=str(record["by"]), save=bool(record["save"]))
        except (ValueError, KeyError, TypeError):
            return cls(id="", by=f"the file {path}")


class Orders:
    """Where ``elastic-fit stop`` leaves its order.

    To be made before anybody can see that a launcher is there: what is there by then was meant for an earlier start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._old = self._heard = _identity(path)

    def has_one(self) -> bool:
        """Whether an order has come that was not taken yet."""
        return _identity(self._path) not in (None, self._heard)

    def take(self) -> Order | None:
        """The order that has come since the last call."""
        found = _identity(self._path)
        if found in (None, self._heard):
            return None
        self._heard = found
        return Order.read(self._path)

    def forget(self) -> None:
        """Take away what has come, so that it doesn't stop the next start."""
        if _identity(self._path) != self._old:
            with contextlib.suppress(OSError):
                self._path.unlink()


class Ears:
    """All that may ask this node to stop.

    Args:
        latch: signals to the launcher.
        grace_s: how long a stop may take.
        orders: of ``elastic-fit stop``.
        file: a file whose appearance asks to stop (``--stop-file``).
        now_ns: CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        latch: Latch,
        grace_s: float,
        *,
        orders: Orders | None = None,
        file: Path | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._latch = latch
        self._grace_s = grace_s
        self._orders = orders
        self._file = file
        self._now_ns = now_ns
        self._looked_ns = now_ns() - int(LOOK_S * 1e9)
        self._has_heard_file = False
        self._has_interrupt = False

    def fileno(self) -> int:
        """Readable when a signal is waiting. Boards and files have to be looked at from time to time."""
        return self._latch.fileno()

    def has_news(self) -> bool:
        """Whether somebody asks who was not heard yet; for whoever is busy, as often as it likes and in any thread."""
        if select.select([self._latch.fileno()], [], [], 0)[0]:
            return True
        if not self._is_time_to_look():
            return False
        if (self._orders is not None and self._orders.has_one()) or self._sees_file():
            return True
        self._looked_ns = self._now_ns()
        return False

    def hear(self, boards: Sequence[tuple[int, Board]] = ()) -> list[StopRequest]:
        """The requests since the last call; `boards` are those of workers that may have been asked, by rank.

        What is on a board stays there: none are to be given once the job stops.
        """
        return [*self._signals(), *self._workers(boards), *self._files()]

    def forget(self) -> None:
        """The run has ended: what asked it to stop must not stop the next one."""
        if self._orders is not None:
            self._orders.forget()

    def _signals(self) -> Iterator[StopRequest]:
        for number in self._latch.take():
            is_interrupt = number == signal.SIGINT
            yield StopRequest(
                source="signal",
                reason=signal.Signals(number).name,
                asked_ns=self._now_ns(),
                grace_s=self._grace_s,
                signal=number,
                insists=is_interrupt and self._has_interrupt,
            )
            self._has_interrupt |= is_interrupt

    def _workers(self, boards: Sequence[tuple[int, Board]]) -> Iterator[StopRequest]:
        for rank, board in boards:
            number = board[Word.SIGNALLED]
            if not number:
                continue
            is_notice = number == NOTICED
            yield StopRequest(
                source="notice" if is_notice else "worker",
                reason=asker(number),
                asked_ns=board[Word.SIGNALLED_NS],
                grace_s=self._grace_s,
                signal=0 if is_notice else number,
                rank=rank,
            )

    def _files(self) -> Iterator[StopRequest]:
        if not self._is_time_to_look():
            return
        self._looked_ns = self._now_ns()
        if self._orders is not None and (order := self._orders.take()) is not None:
            yield self._from("command", order.by, save=order.save, id_=order.id)
        if self._sees_file():
            self._has_heard_file = True
            yield self._from("file", f"the file {self._file}")

    def _is_time_to_look(self) -> bool:
        return self._now_ns() - self._looked_ns >= LOOK_S * 1e9

    def _sees_file(self) -> bool:
        return self._file is not None and not self._has_heard_file and self._file.exists()

    def _from(self, source: str, reason: str, *, save: bool = True, id_: str = "") -> StopRequest:
        return StopRequest(
            source=source, reason=reason, asked_ns=self._now_ns(), grace_s=self._grace_s, save=save, id=id_
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is there, or None."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
