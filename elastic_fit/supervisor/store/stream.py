"""Bytes on their way to storage, digested as they pass.

What makes the bytes (`torch.save` computes a checksum of its own) and what hashes and stores them leave Python's global
lock for most of their time, so the latter has a thread of its own, a bounded number of buffers behind.
"""

from __future__ import annotations

import abc
import errno
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import xxhash

from elastic_fit.supervisor.store.manifest import FileEntry

CHUNK_BYTES = 8 << 20
"""What is handed to the thread at once."""
PIECE_BYTES = 512 << 10
"""What is hashed and stored at once: one brings it into the core's own cache, and the other finds it there."""
WAITING = 3
"""How many chunks may wait for the thread."""


class DigestingStream(abc.ABC):
    """Bytes written front to back, whose digest is ready when the last one is.

    It has what `torch.save` and torch.distributed.checkpoint ask of a file: write, flush, tell, close. Where they go
    is said by a subclass, in `_put` and `_finish`. OSError comes through as it is; after one the stream is of no use.
    """

    def __init__(self, relative: str) -> None:
        self._relative = relative
        self._hash = xxhash.xxh3_128()
        self._size = 0
        self._gathering = memoryview(b"")
        self._gathered = 0
        self._free: list[memoryview] = []
        """Buffers whose bytes are stored: used again, since memory that is new has to be cleared first."""
        self._waiting: deque[Future[None]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self.failure: OSError | None = None
        """What storage said when it refused a write: `torch.save` makes something else of it."""
        self._closed = False
        self._is_whole = False

    def write(self, data: object) -> int:
        """Append bytes; returns how many. They may change as soon as this has returned."""
        if self._closed:
            raise ValueError("write to a closed file")
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            if self._gathered == len(self._gathering):
                self._hand_on()
            taken = view[done : done + len(self._gathering) - self._gathered]
            self._gathering[self._gathered : self._gathered + len(taken)] = taken
            self._gathered += len(taken)
            done += len(taken)
        self._size += done
        return done

    def _hand_on(self) -> None:
        """Have the thread store what is gathered, and begin anew. What went wrong there comes out here."""
        while len(self._waiting) >= WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        if self._gathered:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="elastic-fit-store")
            self._waiting.append(self._thread.submit(self._store, self._gathering))
        self._gathering = self._free.pop() if self._free else memoryview(bytearray(CHUNK_BYTES))
        self._gathered = 0

    def _store(self, view: memoryview) -> None:
        if self.failure is not None:
            raise self.failure
        try:
            for start in range(0, len(view), PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                self._hash.update(piece)
                self._put(piece)
        except OSError as error:
            self.failure = error
            raise
        self._free.append(view)

    def flush(self) -> None:  # noqa: B027 - there is nothing to be overridden
        """Nothing: bytes are handed on as they come, and all of them are there after `close`."""

    def _drain(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()
        if self._gathered:
            self._store(self._gathering[: self._gathered])

    @abc.abstractmethod
    def _put(self, view: memoryview) -> None:
        """Store all of it, after what came before."""

    @abc.abstractmethod
    def _finish(self, *, whole: bool) -> None:
        """Make durable what was put, if it is `whole`, and let go of it."""

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._closed

    def close(self) -> None:
        """Make it durable and close it."""
        if self._closed:
            return
        try:
            self._drain()
        except BaseException:
            self.abandon()
            raise
        self._end(whole=True)

    def abandon(self) -> None:
        """Close it as it is: nobody will want it."""
        if not self._closed:
            self._end(whole=False)

    def _end(self, *, whole: bool) -> None:
        self._closed = True
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._gathering = memoryview(b"")
        self._free.clear()
        self._finish(whole=whole)
        self._is_whole = whole

    def __enter__(self) -> DigestingStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self.abandon()
        if self.failure is not None and self.failure is not error:
            raise self.failure from error  # what `torch.save` makes of it is an inconsistent archive

    def entry(self) -> FileEntry:
        """Name, size and digest. Raises OSError where it did not get to its end."""
        if not self._is_whole:
            raise self.failure or OSError(errno.EIO, f"the writing of {self._relative or 'the file'} was broken off")
        return FileEntry(path=self._relative, size=self._size, digest=self.hexdigest())

    def hexdigest(self) -> str:
        """Of all that was stored so far; steady once it is closed."""
        return self._hash.hexdigest()
