"""Bytes on their way to storage, digested as they pass.

What makes the bytes (`torch.save` computes a checksum of its own) and what hashes and stores them leave Python's global
lock for most of their time, so the latter has a thread of its own, a bounded number of buffers behind.
"""

from __future__ import annotations

import errno
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import xxhash

from elastic_fit.supervisor.store.manifest import FileEntry

CHUNK_BYTES = 8 << 20
"""What is hashed and handed to storage at once."""
WAITING = 3
"""How many such pieces may wait for that."""


class DigestingStream:
    """Bytes written front to back, whose digest is ready when the last one is.

    It has what `torch.save` and torch.distributed.checkpoint ask of a file: write, flush, tell, close. Where they go
    is said by a subclass, in `_put` and `_finish`. OSError comes through as it is; after one the stream is of no use.
    """

    def __init__(self, relative: str) -> None:
        self._relative = relative
        self._hash = xxhash.xxh3_128()
        self._size = 0
        self._gathered = bytearray()
        self._waiting: deque[Future[None]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self.failure: OSError | None = None
        """What storage said when it refused a write: `torch.save` makes something else of it."""
        self._closed = False
        self._is_whole = False

    def write(self, data: object) -> int:
        """Append bytes; returns how many. They may change as soon as this has returned."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            taken = view[done : done + CHUNK_BYTES - len(self._gathered)]
            self._gathered += taken
            done += len(taken)
            if len(self._gathered) == CHUNK_BYTES:
                self._hand_on()
        self._size += done
        return done

    def _hand_on(self) -> None:
        """Have the thread store what is gathered. What went wrong there comes out here."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="elastic-fit-store")
        while len(self._waiting) >= WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        gathered, self._gathered = self._gathered, bytearray()
        self._waiting.append(self._thread.submit(self._store, gathered))

    def _store(self, gathered: bytearray) -> None:
        if self.failure is not None:
            raise self.failure
        self._hash.update(gathered)
        try:
            self._put(memoryview(gathered))
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        """Nothing: bytes are handed on as they come, and all of them are there after `close`."""

    def _drain(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._store(gathered)

    def _put(self, view: memoryview) -> None:
        """Store all of it, after what came before."""
        raise NotImplementedError

    def _finish(self, *, whole: bool) -> None:
        """Make durable what was put, if it is `whole`, and let go of it."""
        raise NotImplementedError

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
        return FileEntry(path=self._relative, size=self._size, digest=self._hash.hexdigest())
