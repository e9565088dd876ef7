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
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 16


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
    def __init__(self, route: Route, source: int) -> None:
        self.source = source
        self._console = route.console
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
        # A console that has gone away (a closed pipe or terminal) must not end the training.
        with contextlib.suppress(OSError):
            _write_all(self._console, data)

    def close(self) -> None:
        os.close(self.source)
        if self._log is not None:
            os.close(self._log)


class Streams:
    """Copies the output of an attempt's workers in a thread of its own."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None

    def open(self, route: Route) -> int:
        """A descriptor for a worker to write to; a terminal where the console is one, so that progress bars work."""
        if route.console is not None and os.isatty(route.console):
            source, sink = _terminal_like(route.console)
        else:
            source, sink = os.pipe()
        self._selector.register(source, selectors.EVENT_READ, _Stream(route, source))
        return sink

    def start(self) -> None:
        """Begin to copy. All streams must have been opened."""
        self._thread = threading.Thread(target=self._pump, name="elastic-fit-streams", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                stream: _Stream = key.data
                if not stream.copy():
                    self._selector.unregister(stream.source)
                    stream.close()

    def finish(self, timeout_s: float = 2.0) -> None:
        """Wait until all output of the ended workers is copied, at most so long."""
        if self._thread is not None:
            self._thread.join(timeout_s)


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
