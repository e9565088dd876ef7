"""The run's ledger: ``events.jsonl``, append-only, one JSON object a line.

Every process of the run appends to the same file. A line is one ``write`` on a descriptor opened with ``O_APPEND``,
so lines of several writers never mix on a local file system. (On NFS an append is not atomic between hosts: `read`
skips a line that it can't parse and counts it.)
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


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

    Args:
        path: the file; it and its folder are made when the first event is written.
        clock: seconds since the epoch.
        **always: fields that every event of this writer carries, such as ``generation`` and ``attempt``.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, **always: Any) -> None:
        self.path = Path(path)
        self._clock = clock
        self._always = always
        self._host = socket.gethostname()

    def bind(self, **always: Any) -> Ledger:
        """A writer to the same file whose events carry `always` as well."""
        return Ledger(self.path, clock=self._clock, **{**self._always, **always})

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Raises OSError where the file can't be written."""
        record = {"t": round(self._clock(), 6), "event": event, "host": self._host, "pid": os.getpid()}
        line = json.dumps({**record, **self._always, **fields}, default=str) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read(path: Path) -> list[Event]:
    """All events of a ledger, in the order written; none where the file is missing.

    A line that is not whole (its writer died, or two hosts appended at once over NFS) is left out.
    """
    return list(_parse(path))


def _parse(path: Path) -> Iterator[Event]:
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return
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
