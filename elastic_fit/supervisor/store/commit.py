"""The commit protocol, for a file and for a folder of shards.

1. Everything is written under a temporary name *in the target folder*, its digest computed as the bytes pass by.
2. Each file is synced, then the temporary folder (if it is one), before it gets its name.
3. The data is renamed to its name and the target folder synced.
4. The manifest is written the same way, last. *Its rename is the commit; nothing before it may be read as valid.*

Nothing is overwritten in place. A failed fsync is never repeated on the same file: the kernel may have dropped the
dirty pages and report success the second time, so the whole save starts over with new files.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store.manifest import SUFFIX, Facts, FileEntry, Manifest, check_relative
from elastic_fit.supervisor.store.stream import CHUNK_BYTES, DigestingStream

if TYPE_CHECKING:
    from elastic_fit.supervisor.store.folder import Checkpoint

TEMPORARY = ".tmp-"
DELETING = ".del-"


class SaveFailed(StorageError):
    """A checkpoint could not be written; the ones before it are as they were."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"could not write {path}: {error.strerror or error}",
            hint="the checkpoints before it are untouched; free some space or mend the storage",
        )
        self.path = str(path)
        self.errno = error.errno


class Fence(Protocol):
    """Tells whether this process may still commit."""

    def check(self) -> None:
        """Raise FencedOff where a newer generation has taken the run."""


class Disk:
    """What the protocol does to the disk; replaced in tests to make one call fail."""

    def create(self, path: Path) -> int:
        """A descriptor of a new file that nobody else has made."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`; returns how many bytes."""
        return os.write(descriptor, data)

    def begin_writeback(self, descriptor: int, start: int, length: int) -> None:
        """Have the kernel begin to write that part to the device, so that less is left for `sync`."""
        # On Linux this starts the writing; only pages that are clean already, and these aren't, are dropped.
        # An error of the device is told by the sync; a file system that takes no advice has nothing to tell.
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)

    def sync(self, descriptor: int) -> None:
        """Force the file, or the folder, to the device."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give it its name."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make a folder."""
        os.mkdir(path, 0o700)

    def sync_folder(self, path: Path) -> None:
        """Force a folder's names to the device."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)


class DigestingFile(DigestingStream):
    """A new file, written front to back, whose digest is ready when the last byte is. Closing syncs it."""

    def __init__(self, path: Path, relative: str, disk: Disk) -> None:
        super().__init__(relative)
        self.path = path
        self._disk = disk
        self._stored = 0
        self._begun = 0
        self._descriptor = disk.create(path)

    def _put(self, view: memoryview) -> None:
        written = 0
        while written < len(view):
            written += self._disk.write(self._descriptor, view[written:])
        self._stored += written
        if self._stored - self._begun >= CHUNK_BYTES:
            self._disk.begin_writeback(self._descriptor, self._begun, self._stored - self._begun)
            self._begun = self._stored

    def _finish(self, *, whole: bool) -> None:
        try:
            if whole:
                self._disk.sync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def fileno(self) -> int:
        """The open descriptor."""
        return self._descriptor


class Staged:
    """A checkpoint that is being written. Leaving it as a context manager without `commit` removes what is there.

    Either `open` it as one file, or `mkdir` it and `open_part` the shards, on as many ranks as there are: others get
    at it with `CheckpointStore.join`.
    """

    def __init__(self, root: Path, name: str, path: Path, *, fence: Fence, disk: Disk) -> None:
        self.path = path
        self._root = root
        self._name = name
        self._fence = fence
        self._disk = disk
        self._files: list[DigestingFile] = []
        self._committed = False

    @property
    def target(self) -> Path:
        """The name it will have."""
        return self._root / self._name

    @property
    def failure(self) -> OSError | None:
        """What the disk said when it refused something to this process."""
        return next((file.failure for file in self._files if file.failure is not None), None)

    def mkdir(self) -> Path:
        """Make it a folder."""
        with _as_save_failed(self.target):
            self._disk.mkdir(self.path)
        return self.path

    def open(self) -> DigestingFile:
        """Make it one file, and write that."""
        return self._open(self.path, "")

    def open_part(self, relative: str) -> DigestingFile:
        """Write one file of the folder. `relative` is below the folder, with ``/``."""
        check_relative(relative)
        return self._open(self.path / relative, relative)

    def _open(self, path: Path, relative: str) -> DigestingFile:
        file = DigestingFile(path, relative, self._disk)
        self._files.append(file)
        return file

    def digests(self) -> tuple[FileEntry, ...]:
        """Of the files that this process has written."""
        for file in self._files:
            file.close()
        return tuple(file.entry() for file in self._files)

    def commit(self, facts: Facts, *, parts: Iterable[FileEntry] = ()) -> Checkpoint:
        """Make it durable and visible.

        Args:
            facts: what the manifest says.
            parts: entries of the files that other ranks have written.

        Raises FencedOff where a newer generation has taken the run, SaveFailed where the disk refuses.
        """
        with _as_save_failed(self.target):
            mine = self.digests()
        return self.commit_entries(facts, (*mine, *parts))

    def commit_entries(self, facts: Facts, entries: Iterable[FileEntry]) -> Checkpoint:
        """Commit what is staged as exactly these files, whoever has written them. Raises as `commit` does."""
        from elastic_fit.supervisor.store.folder import Checkpoint

        with _as_save_failed(self.target):
            is_folder = self.path.is_dir()
            files = tuple(sorted(entries, key=lambda entry: entry.path))
            fields = {name: getattr(facts, name) for name in Facts.__dataclass_fields__}
            manifest = Manifest(**fields, files=files, is_folder=is_folder)
            if is_folder:
                for folder in _folders(self.path):
                    self._disk.sync_folder(folder)
            self._fence.check()
            replaced = self._set_aside(manifest.generation)
            self._disk.rename(self.path, self.target)
            self._disk.sync_folder(self.target.parent)
            self._commit_manifest(manifest)
            if replaced is not None:
                self._disk.unlink(manifest_path(replaced))
                remove_tree(replaced, self._disk)
        self._committed = True
        return Checkpoint(path=self.target, manifest=manifest)

    def _set_aside(self, generation: int) -> Path | None:
        """Give what has this name already another one, under which it stays valid until the new one is committed."""
        final = manifest_path(self.target)
        if not final.exists():
            remove_tree(self.target, self._disk)  # never committed, or half deleted
            return None
        stem = self.target.name.removesuffix(".ckpt")
        aside = self.target.with_name(f"{stem}.replaced-{generation}-{secrets.token_hex(4)}.ckpt")
        os.link(final, manifest_path(aside))
        # Validity passes from the one name to the other with this rename.
        self._disk.rename(self.target, aside)
        self._disk.sync_folder(final.parent)
        self._disk.unlink(final)
        return aside

    def _commit_manifest(self, manifest: Manifest) -> None:
        final = manifest_path(self.target)
        temporary = temporary_path(final, manifest.generation)
        try:
            file = DigestingFile(temporary, "", self._disk)
            with file:
                file.write(manifest.to_bytes())
            self._fence.check()
            self._disk.rename(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            remove_tree(self.target, self._disk)
            raise
        # From here on it is committed; a crash before the folder is synced may lose it, but never tear it.
        self._disk.sync_folder(final.parent)
        try:
            self._fence.check()
        except StorageError:
            # Fenced off between the check and the rename: withdraw what nobody was told of.
            self._disk.unlink(final)
            remove_tree(self.target, self._disk)
            raise

    def __enter__(self) -> Staged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def discard(self) -> None:
        """Remove what is staged, unless it was committed."""
        if self._committed:
            return
        for file in self._files:
            with contextlib.suppress(OSError):
                file.abandon()
        with contextlib.suppress(OSError):
            remove_tree(self.path, self._disk)


def manifest_path(data: Path) -> Path:
    """Where the manifest of that checkpoint is."""
    return data.with_name(data.name + SUFFIX)


def temporary_path(final: Path, generation: int) -> Path:
    """A free temporary name beside `final`, hidden, that tells who may sweep it."""
    return final.with_name(f".{final.name}{TEMPORARY}{generation}-{os.getpid()}-{secrets.token_hex(4)}")


def remove_tree(path: Path, disk: Disk) -> None:
    """Remove a file or a folder without following links; nothing happens where there is none."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        disk.unlink(path)


def _folders(root: Path) -> list[Path]:
    return [Path(folder) for folder, _, _ in os.walk(root, topdown=False)]


@contextlib.contextmanager
def _as_save_failed(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveFailed(target, error) from error
