"""The commit protocol, for a file and for a folder of shards.

1. Everything is written under temporary names *in the target folder*, the digest computed as the bytes pass by: the
   data, and the manifest that describes it. Each file is synced when it is closed, a folder before it gets its name.
2. The fence is asked. If there is a checkpoint of that name, it is set aside under another one, where it stays valid.
3. The data is renamed to its name, and the target folder synced.
4. The manifest is renamed, last. *That rename is the commit; nothing before it may be read as valid.* The target folder
   is synced, and only then is the save acknowledged, and the checkpoint that was set aside deleted.

Nothing is overwritten in place. A failed fsync is never repeated on the same file: the kernel may have dropped the
dirty pages and report success the second time. The save has failed, and whoever wants to try again stages a new one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store.disk import DELETING, Disk, exists, hidden_path, new_token, remove_tree
from elastic_fit.supervisor.store.generation import Fence
from elastic_fit.supervisor.store.leftovers import put_back, remove
from elastic_fit.supervisor.store.manifest import Facts, FileEntry, Manifest, aside_name, check_relative, manifest_path
from elastic_fit.supervisor.store.staging import Staging
from elastic_fit.supervisor.store.stream import CHUNK_BYTES, DigestingStream
from elastic_fit.supervisor.store.verify import remember

if TYPE_CHECKING:
    from elastic_fit.supervisor.store.folder import Checkpoint

log = logging.getLogger("elastic_fit")

CACHED_BYTES = 1 << 30
"""How much of a file's beginning stays in the page cache, where a restart finds it at once."""
BACKLOG_BYTES = 512 << 20
"""How far the disk may be behind; what it has had longer to store is not asked after again."""


class DigestingFile(DigestingStream):
    """A new file, written front to back, whose digest is ready when the last byte is. Closing syncs it."""

    def __init__(self, path: Path, relative: str, disk: Disk) -> None:
        super().__init__(relative)
        self.path = path
        self._disk = disk
        self._stored = 0
        self._begun = 0
        self._descriptor = disk.create(path)
        self.status: os.stat_result | None = None
        """How the file was when it had been synced."""

    def _put(self, view: memoryview) -> None:
        written = 0
        while written < len(view):
            count = self._disk.write(self._descriptor, view[written:])
            if count == 0:
                raise OSError(errno.EIO, "the disk takes no more and says no reason")
            written += count
        self._stored += written
        if self._stored - self._begun >= CHUNK_BYTES:
            self._disk.begin_writeback(self._descriptor, self._begun, self._stored - self._begun)
            self._begun = self._stored
            self._let_go()

    def _let_go(self) -> None:
        """Leave no more than the file's beginning in the page cache."""
        start = max(CACHED_BYTES, self._stored - BACKLOG_BYTES)
        if start < self._stored:
            self._disk.let_go(self._descriptor, start, self._stored - start)

    def _finish(self, *, whole: bool) -> None:
        try:
            if whole:
                self._disk.sync(self._descriptor)
                self._let_go()
                self.status = os.fstat(self._descriptor)
        except OSError as error:
            self.failure = error
            raise
        finally:
            os.close(self._descriptor)

    def fileno(self) -> int:
        """The open descriptor."""
        return self._descriptor


class Staged(Staging[Path]):
    """A checkpoint that is being written in a folder.

    Either `open` it as one file, or `mkdir` it and `open_part` the shards, on as many ranks as there are: others get
    at it with `CheckpointStore.join`.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        path: Path,
        *,
        fence: Fence,
        disk: Disk,
        generation: int = 0,
        told: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__(root, name, fence=fence, generation=generation)
        self.path = path
        self._disk = disk
        self._told = told
        self._files: list[DigestingFile] = []
        self._refused: OSError | None = None

    @property
    def failure(self) -> OSError | None:
        """See `Staging`."""
        refused = [self._refused, *(file.failure for file in self._files)]
        return next((one for one in refused if one is not None), None)

    def mkdir(self) -> Path:
        """Make it a folder."""
        with self.failing():
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
        try:
            file = DigestingFile(path, relative, self._disk)
        except OSError as error:
            self._refused = error
            raise
        self._files.append(file)
        return file

    def digests(self) -> tuple[FileEntry, ...]:
        """Of the files that this process has written. Raises OSError where the disk has refused one of them."""
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
        with self.failing():
            mine = self.digests()
        return self.commit_entries(facts, (*mine, *parts))

    def commit_entries(self, facts: Facts, entries: Iterable[FileEntry]) -> Checkpoint:
        """Commit what is staged as exactly these files, whoever has written them. Raises as `commit` does."""
        from elastic_fit.supervisor.store.folder import Checkpoint

        with self.failing(), _kept_open(self.path) as mine:
            manifest = self._write_manifest(facts, entries)
            aside = self._aside()
            try:
                self._fence.check()
                if aside is not None:
                    self._set_aside(aside)
                self._fence.check()
                self._disk.rename(self.path, self.target)
                self._disk.sync_folder(self.target.parent)
                self._fence.check()
                # The commit. An older generation fails here: the new one has swept its manifest away.
                self._disk.rename(manifest_path(self.path), manifest_path(self.target))
            except BaseException:
                if not self._is_committed(manifest):
                    self._undo(aside, mine)
                raise
            self._committed = True
            self._disk.sync_folder(self.target.parent)
        self._told(manifest.total_bytes)
        self._remember()
        if aside is not None:
            self._let_go(aside)
        return Checkpoint(path=self.target, manifest=manifest)

    def _write_manifest(self, facts: Facts, entries: Iterable[FileEntry]) -> Manifest:
        is_folder = self.path.is_dir()
        files = tuple(sorted(entries, key=lambda entry: entry.path))
        fields = {name: getattr(facts, name) for name in Facts.__dataclass_fields__}
        manifest = Manifest(**fields, files=files, is_folder=is_folder, name=self.target.name)
        if is_folder:
            for folder, _, _ in os.walk(self.path, topdown=False, onerror=_raise):
                self._disk.sync_folder(Path(folder))
        with DigestingFile(manifest_path(self.path), "", self._disk) as file:
            file.write(manifest.to_bytes())
        return manifest

    def _aside(self) -> Path | None:
        """Another name for what has this one: hidden if it was never committed; None where nothing has it."""
        if not exists(self.target):
            return None
        if exists(manifest_path(self.target)):
            return self.target.with_name(aside_name(self.target.name, new_token(self._generation)))
        return hidden_path(self.target, DELETING, self._generation)

    def _set_aside(self, aside: Path) -> None:
        if exists(manifest_path(self.target)):
            self._disk.link(manifest_path(self.target), manifest_path(aside))
            self._disk.sync_folder(aside.parent)
        # A committed checkpoint stays valid: with this rename, under its new name.
        self._disk.rename(self.target, aside)
        self._disk.sync_folder(aside.parent)

    def _is_committed(self, manifest: Manifest) -> bool:
        """Whether the commit was done before the exception came (Ctrl-C can come anywhere)."""
        with contextlib.suppress(OSError):
            return manifest_path(self.target).read_bytes() == manifest.to_bytes()
        return False

    def _undo(self, aside: Path | None, mine: int) -> None:
        """Give the name back to what had it. What can't be undone now, the next sweep does."""
        with contextlib.suppress(OSError):
            if exists(self.target) and os.path.samestat(self.target.lstat(), os.fstat(mine)):
                self._disk.rename(self.target, self.path)
            if aside is not None:
                put_back(aside, self.target, self._disk)

    def _let_go(self, aside: Path) -> None:
        try:
            remove(aside, self._disk, self._fence, self._generation)
        except (OSError, StorageError) as error:
            # The new one is committed; the one that it has replaced goes with the next sweep.
            log.warning("elastic-fit: could not remove %s: %s", aside, error)

    def _remember(self) -> None:
        """What this process has written, and nobody has touched since, it need not read to know."""
        for file in self._files:
            entry, before = file.entry(), file.status
            with contextlib.suppress(OSError):
                now = (self.target / entry.path if entry.path else self.target).lstat()
                if before is not None and _content(before) == _content(now):
                    remember(now, entry.digest)

    def discard(self) -> None:
        """See `Staging`."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.abandon()
        if self._committed:
            return
        for path in (self.path, manifest_path(self.path)):
            with contextlib.suppress(OSError):
                remove_tree(path, self._disk)


@contextlib.contextmanager
def _kept_open(path: Path) -> Iterator[int]:
    """A descriptor that tells the file or folder from any other: as long as it is open, its inode is not used again."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _content(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _raise(error: OSError) -> None:
    raise error
