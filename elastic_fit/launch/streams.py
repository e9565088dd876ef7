"""Workers' output: every attempt's goes to its own files, and on to the console as torchrun would show it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import selectors
import struct
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from elastic_fit.launch.outlet import Outlet

CHUNK_BYTES = 1 << 16
PATIENCE_S = 30.0
"""How long a console that nobody reads (a pager that waits, a terminal that is stopped) holds the workers up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where one stream of one worker goes."""

    log: Path
    """The file that keeps it."""
    console: int | None
    """Descriptor that shows it, or None."""
    prefix: str = ""
    """Put before each line on the console."""


class _Stream:
    def __init__(self, route: Route, source: int, console: Outlet | None) -> None:
        self.source = source
        self._console = console
        self._prefix = route.prefix.encode()
        self._path = route.log
        self._log: int | None = None
        with contextlib.suppress(OSError):  # `_keep` tries again, and says what is missing
            self._log = self._open()
        self._line = b""
        self._lost_bytes = 0

    def copy(self) -> bool:
        """Move what is there; False at the end."""
        try:
            data = os.read(self.source, CHUNK_BYTES)
        except OSError:  # EIO: the last writer of a terminal has closed it
            data = b""
        if not data:
            self._show(b"\n" if self._line else b"")
            return False
        self._keep(data)
        self._show(data)
        return True

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _keep(self, data: bytes) -> None:
        """Into the file; a disk that refuses must not hold the worker up, and the file says what it lacks."""
        left = memoryview(data)
        try:
            if self._log is None:
                self._log = self._open()
            if self._lost_bytes:
                gap = f"\n[elastic-fit: {self._lost_bytes} bytes are missing here: the disk refused them]\n"
                _write_all(self._log, gap.encode())
                self._lost_bytes = 0
            while left:
                left = left[os.write(self._log, left) :]
        except OSError:
            self._lost_bytes += len(left)

    def _show(self, data: bytes) -> None:
        if self._console is None or not data:
            return
        if self._prefix:
            *lines, self._line = (self._line + data).split(b"\n")
            data = b"".join(self._prefix + line + b"\n" for line in lines)
        self._console.write(data)

    def close(self) -> None:
        os.close(self.source)
        if self._log is not None:
            os.close(self._log)


class Streams:
    """Copies the output of an attempt's workers in a thread of its own.

    Args:
        patience_s: how long a console that nobody reads may hold them up; what is lost there is in the files.
    """

    def __init__(self, *, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None
        self._consoles: dict[int, Outlet] = {}
        self._copied = 0
        self._ran_dry = 0

    def open(self, route: Route) -> int:
        """A descriptor for a worker to write to; a terminal where the console is one, so that progress bars work."""
        if route.console is not None and os.isatty(route.console):
            source, sink = _terminal_like(route.console)
        else:
            source, sink = os.pipe()
        self._selector.register(source, selectors.EVENT_READ, _Stream(route, source, self._outlet(route.console)))
        return sink

    def _outlet(self, console: int | None) -> Outlet | None:
        if console is None:
            return None
        if console not in self._consoles:
            self._consoles[console] = Outlet(console, patience_s=self._patience_s)
        return self._consoles[console]

    def start(self) -> None:
        """Begin to copy. All streams must have been opened."""
        self._thread = threading.Thread(target=self._pump, name="elastic-fit-streams", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        while self._selector.get_map():
            ready = self._selector.select(0)
            if not ready:
                self._ran_dry += 1
                ready = self._selector.select()
            for key, _ in ready:
                stream: _Stream = key.data
                self._copied += 1
                if not stream.copy():
                    self._selector.unregister(stream.source)
                    stream.close()
        for console in self._consoles.values():
            console.close()

    def finish(self, stalled_s: float = 2.0, most_s: float = 30.0) -> None:
        """Wait until all output of the ended workers is copied, at most `most_s`, and only while it goes on.

        That it once was gives it away, too: who writes after that has outlived them.
        """
        until = time.monotonic() + most_s
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < until:
            before, ran_dry = self._progress(), self._ran_dry
            self._thread.join(stalled_s)
            if self._progress() == before or self._ran_dry != ran_dry:
                return

    def _progress(self) -> int:
        return self._copied + sum(console.shown_bytes for console in self._consoles.values())


def _terminal_like(console: int) -> tuple[int, int]:
    source, sink = pty.openpty()
    attributes = termios.tcgetattr(sink)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(sink, termios.TCSANOW, attributes)
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(console, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
        fcntl.ioctl(sink, termios.TIOCSWINSZ, size)
    for descriptor in (source, sink):
        os.set_inheritable(descriptor, False)
    return source, sink


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
