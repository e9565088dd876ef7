"""What the store asks of an object store, through fsspec; whatever its client raises comes out as OSError."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Url:
    """A place in an object store, with the few things of a Path that the store needs."""

    text: str

    @property
    def name(self) -> str:
        """The last part."""
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """Without the last part."""
        return Url(self.text.rstrip("/").rpartition("/")[0])

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.text


def is_remote(place: object) -> bool:
    """Whether `place` is a URL of something other than this machine's file system."""
    text = str(place)
    return "://" in text and not text.startswith(("file://", "local://"))


def local_path(place: object) -> Path:
    """The path that a place on this machine's file system has, ``file://`` or not."""
    return Path(str(place).removeprefix("file://").removeprefix("local://"))


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def _as_os_error(call: Callable[P, R]) -> Callable[P, R]:
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _errors():
            return call(*args, **kwargs)

    return wrapped


class Upload:
    """One object of a free name on its way; it is there, whole, when `complete` returns, and not before on S3 and GCS.

    FileExistsError, there at its end, elsewhere when it begins, where the name has been taken.
    """

    @_as_os_error
    def __init__(self, filesystem: Any, url: str, part_bytes: int) -> None:
        from fsspec.spec import AbstractBufferedFile

        self._file = filesystem.open(url, "xb", block_size=part_bytes)
        self.is_visible = not isinstance(self._file, AbstractBufferedFile)
        """Whether there is an object, be it a part of one."""

    @_as_os_error
    def put(self, view: memoryview) -> None:
        """Append; goes out in parts."""
        self._file.write(view)

    @_as_os_error
    def complete(self) -> None:
        """Make it visible."""
        try:
            self._file.close()
        except BaseException:
            with contextlib.suppress(Exception):  # nobody sees the parts that stay
                self.give_up()
            raise
        self.is_visible = True

    @_as_os_error
    def give_up(self) -> None:
        """Forget the parts that are there."""
        if self.is_visible:
            self._file.close()
        else:
            self._file.discard()
            self._file.closed = True  # else its finalizer would send the rest


class Objects:
    """The objects below a URL. Names are relative to it. All methods raise OSError."""

    def __init__(self, root: Url) -> None:
        self._root = root
        self._opened: Any = None

    @property
    def _fs(self) -> Any:
        # The same instance that Lightning gets: what it has cached of listings is forgotten with every write of ours.
        if self._opened is None:
            from fsspec.core import url_to_fs

            self._opened = url_to_fs(self._root.text)[0]
        return self._opened

    def _url(self, name: str) -> str:
        return (self._root / name).text if name else self._root.text

    def upload(self, name: str, part_bytes: int) -> Upload:
        """Begin an object of a free name."""
        return Upload(self._fs, self._url(name), part_bytes)

    @_as_os_error
    def put_new(self, name: str, data: bytes) -> None:
        """A small object of a free name, in one request. FileExistsError where it is taken and the store can tell."""
        self._fs.pipe_file(self._url(name), data, mode="create")

    @_as_os_error
    def read(self, name: str, start: int, end: int) -> bytes:
        """That range, or what there is of it."""
        return bytes(self._fs.cat_file(self._url(name), start=start, end=end))

    @_as_os_error
    def size(self, name: str) -> int:
        """Bytes. FileNotFoundError where there is no such object."""
        self._fs.invalidate_cache()
        info = self._fs.info(self._url(name))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "it is not an object", self._url(name))
        return int(info["size"])

    @_as_os_error
    def names(self) -> list[str]:
        """What is directly below."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root.text, detail=False)
            return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)
        except FileNotFoundError:
            return []

    @_as_os_error
    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._url(name)))

    @_as_os_error
    def copy(self, source: str, target: str) -> None:
        """Within the store, without going through this machine where it can."""
        self._fs.copy(self._url(source), self._url(target))

    @_as_os_error
    def delete(self, name: str) -> None:
        """Nothing happens where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._url(name))
