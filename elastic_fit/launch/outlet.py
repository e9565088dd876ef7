"""A place that people read. It may be unread, full or gone, and holds nobody up for ever."""

from __future__ import annotations

import errno
import os
import select
import stat

PIECE_BYTES = 4096
"""What a pipe that is ready takes without blocking (PIPE_BUF)."""
GONE = (errno.EPIPE, errno.EIO)
"""Nobody will ever read there again: a closed pipe, a terminal that has hung up."""


class Outlet:
    """Writes to one descriptor, and never raises OSError.

    Args:
        descriptor: where to write; it stays the caller's.
        patience_s: how long to wait for a reader. What comes after that is dropped until somebody reads again, who is
            told how much it was.
    """

    def __init__(self, descriptor: int, *, patience_s: float) -> None:
        self.shown_bytes = 0
        """How much has been written: it grows while somebody reads."""
        self._own = _opened_anew(descriptor)
        self._descriptor = descriptor if self._own is None else self._own
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._patience_s = patience_s
        self._is_unread = False
        self._is_gone = False
        self._missing_bytes = 0

    def write(self, data: bytes) -> None:
        """Show it, or count it as missing."""
        if self._is_gone:
            return
        if self._missing_bytes:
            gap = f"\n[elastic-fit: {self._missing_bytes} bytes could not be shown here]\n".encode()
            if self._show(gap):
                self._missing_bytes += len(data)
                return
            self._missing_bytes = 0
        self._missing_bytes += self._show(data)

    def _show(self, data: bytes) -> int:
        """Returns how much of it is left."""
        left = memoryview(data)
        try:
            while left and self._is_read():
                try:
                    written = os.write(self._descriptor, left[:PIECE_BYTES])
                except BlockingIOError:  # another writer has been quicker
                    continue
                self.shown_bytes += written
                left = left[written:]
        except OSError as failure:
            self._is_gone = failure.errno in GONE
        return len(left)

    def _is_read(self) -> bool:
        """Wait until it takes something; who hasn't read for all of the patience isn't waited for again."""
        ready = self._poll.poll(0 if self._is_unread else self._patience_s * 1000)
        self._is_unread = not ready
        return bool(ready)

    def close(self) -> None:
        """Let go of what it has opened itself."""
        if self._own is not None:
            os.close(self._own)


def _opened_anew(descriptor: int) -> int | None:
    """The same terminal or pipe, not blocking: one that is ready may take less than it is given, or have been filled by
    another writer just then, and would wait with the rest.

    None where it is something else, or not ours to open. Whoever else has it open sees no change.
    """
    if not (os.isatty(descriptor) or stat.S_ISFIFO(os.fstat(descriptor).st_mode)):
        return None
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
