"""The run's ledger: ``events.jsonl``, append-only, one JSON object a line.

Every process of the run appends to the same file. A line is one ``write`` on a descriptor opened with ``O_APPEND``,
so lines of several writers never mix on a local file system. (On NFS an append is not atomic between hosts: `read`
skips a line that it can't parse and counts it.)
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_fit.supervisor.errors import StorageError, UsageError

MOST_WAITING = 10_000
"""Events that wait in memory for a disk that can't take them; beyond that the oldest go."""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the ledger."""

    t: float
    """Seconds since the epoch, on the writer's wall clock."""
    event: str
    """What happened: ``start``, ``worker_exit``, ``save``, ... (docs/ledger.md lists them all)."""
    host: str
    """Name of the host that wrote the line."""
    pid: int
    """Process that wrote the line."""
    fields: dict[str, Any]
    """Everything else, by name."""

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The field of that name, or `default`."""
        return self.fields.get(name, default)


class Ledger:
    """Appends events to a run's ``events.jsonl``.

    An event that can't be written now (a full disk) waits in memory for the next one: a run doesn't end because its
    diary is full. `failure` tells.

    Args:
        path: the file; it and its folder are made when the first event is written.
        clock: seconds since the epoch.
        **always: fields that every event of this writer carries, such as ``generation`` and ``attempt``.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, **always: Any) -> None:
        self.path = Path(path)
        self.failure: OSError | None = None
        """Why the newest event could not be written; None where all is well."""
        self._clock = clock
        self._always = always
        self._host = socket.gethostname()
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)

    def bind(self, **always: Any) -> Ledger:
        """A writer to the same file whose events carry `always` as well."""
        bound = Ledger(self.path, clock=self._clock, **{**self._always, **always})
        bound._waiting = self._waiting
        return bound

    def write(self, event: str, **fields: Any) -> None:
        """Append one event, after those that wait."""
        record = {"t": round(self._clock(), 6), "event": event, "host": self._host, "pid": os.getpid()}
        self._waiting.append(json.dumps({**record, **self._always, **fields}, default=str).encode() + b"\n")
        try:
            self._append_waiting()
            self.failure = None
        except OSError as error:
            self.failure = error

    def _append_waiting(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            while self._waiting:
                line = self._waiting[0]
                if os.write(descriptor, line) < len(line):
                    # What is torn is no line: readers skip it, and the event is written anew on a line of its own.
                    self._waiting[0] = b"\n" + line.lstrip(b"\n")
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._waiting.popleft()
        finally:
            os.close(descriptor)


def read(path: Path) -> list[Event]:
    """All events of a ledger, in the order written; none where the file is missing.

    A line that is not whole (its writer died, or two hosts appended at once over NFS) is left out. Raises UsageError
    where the caller may not read it, StorageError where the disk can't.
    """
    return list(_parse(path))


def _parse(path: Path) -> Iterator[Event]:
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except PermissionError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}", hint="ask the owner of the run") from error
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror}", hint="look at the disk that it is on") from error
    for line in lines:
        try:
            record = json.loads(line)
            yield Event(
                t=float(record.pop("t")),
                event=str(record.pop("event")),
                host=str(record.pop("host", "")),
                pid=int(record.pop("pid", 0)),
                fields=record,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
