"""A checkpoint that is being written, wherever it goes: what holds in a folder and in an object store alike."""

from __future__ import annotations

import abc
import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store.generation import Fence, check_whether_replaced
from elastic_fit.supervisor.store.objects import Url

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger("elastic_fit")

Place = TypeVar("Place", Path, Url)
T = TypeVar("T")


class SaveFailed(StorageError):
    """A checkpoint could not be written; the ones before it are as they were."""

    def __init__(self, path: Path | Url, error: OSError) -> None:
        super().__init__(
            f"could not write {path}: {error.strerror or error}",
            hint="the checkpoints before it are untouched; free some space or mend the storage",
        )
        self.path = str(path)
        self.errno = error.errno

    @property
    def may_pass(self) -> bool:
        """Whether the same save, with new files, may succeed at once."""
        return self.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)


def twice_if_it_may_pass(write: Callable[[], T]) -> T:
    """What `write` returns, which stages new files each time: what may pass is met once more."""
    try:
        return write()
    except SaveFailed as error:
        if not error.may_pass:
            raise
        log.warning("elastic-fit: %s; trying once more, with new files", error.message)
        return write()


class Staging(abc.ABC, Generic[Place]):
    """A checkpoint that is being written. Leaving it as a context manager without `commit` removes what is there."""

    def __init__(self, root: Place, name: str, *, fence: Fence, generation: int) -> None:
        self._root: Place = root
        self._name = name
        self._fence = fence
        self._generation = generation
        self._committed = False

    @property
    def target(self) -> Place:
        """The name it will have."""
        return self._root / self._name

    @property
    @abc.abstractmethod
    def failure(self) -> OSError | None:
        """What storage said when it refused something to this process."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Remove what is staged, unless it was committed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()
        if self.failure is not None and isinstance(error, Exception) and not isinstance(error, StorageError):
            # What storage has said, whatever a serializer has made of it.
            check_whether_replaced(self._fence)
            raise SaveFailed(self.target, self.failure) from error

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """What storage refuses is a SaveFailed, or FencedOff where that is the reason."""
        try:
            yield
        except OSError as error:
            check_whether_replaced(self._fence)
            raise SaveFailed(self.target, error) from error
