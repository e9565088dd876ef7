"""The arbiter: where the roster lives, so that whoever stores the next version first has decided.

It holds one versioned document and one counter per node. Two places can be the arbiter: the shared run folder and an
etcd server. A TCP store can't: what was decided in it is gone with its host (docs/elastic.md).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from elastic_fit.supervisor.errors import ElasticFitError, StorageError
from elastic_fit.supervisor.roster import Roster

KEEP_VERSIONS = 64
"""Old versions of the roster that stay in the folder, for people to read."""


class ArbiterLost(ElasticFitError):
    """The arbiter did not answer; what was asked of it may or may not have happened."""


class Arbiter(Protocol):
    """A compare-and-set cell and the nodes' counters. Every call but `check` may block, and raises ArbiterLost."""

    def check(self) -> None:
        """Raise StorageError where nothing could ever be decided here."""

    def read(self) -> tuple[int, bytes] | None:
        """The newest version and its document, or None where there is none.

        Raises StorageError where it can't be told which version that is.
        """

    def where(self, version: int) -> str:
        """Where a person finds that version."""

    def store(self, version: int, document: bytes) -> bool:
        """Store `document` as `version` if that is the next one and nobody has; says whether this call did."""

    def beat(self, node: str, counter: int) -> None:
        """Leave this node's counter."""

    def counters(self, nodes: Iterable[str]) -> dict[str, str]:
        """The counters of those nodes that have left one."""

    def forget(self, node: str) -> None:
        """Remove a node's counter."""


def roster_of(arbiter: Arbiter, found: tuple[int, bytes]) -> Roster:
    """What `Arbiter.read` has found there. Raises StorageError where that is no roster."""
    version, document = found
    try:
        return Roster.parse(document)
    except ValueError as error:
        raise unreadable(arbiter.where(version), error) from error


def unreadable(where: str, error: ValueError) -> StorageError:
    """What is told of a document that is no roster."""
    return StorageError(
        f"what the nodes have agreed on last can't be read: {where}: {error}",
        hint="another version of elastic-fit may have written it; else, once no node of the job lives any more, "
        "delete it and start the job again: no checkpoint is in there",
    )


class FolderArbiter:
    """The arbiter in a folder that all nodes share.

    Version n is the file ``n.json``. It is written whole under another name and then linked: `link` fails where the
    name exists, on local file systems and on NFS, which makes it the compare-and-set.

    Args:
        root: the folder; made where it is missing.
    """

    def __init__(self, root: Path) -> None:
        self._rosters = root / "rosters"
        self._nodes = root / "nodes"
        self._newest: tuple[int, bytes] | None = None

    def check(self) -> None:
        """Raise StorageError where this folder can't decide anything, because its file system has no hard links."""
        probe = self._rosters / f".{os.getpid()}.{secrets.token_hex(8)}"
        try:
            self._rosters.mkdir(parents=True, exist_ok=True)
            probe.touch()
            try:
                os.link(probe, f"{probe}.link")
                os.unlink(f"{probe}.link")
            finally:
                probe.unlink()
        except OSError as error:
            raise StorageError(
                f"the nodes can't agree in {self._rosters}: {error.strerror or error}",
                hint="a run folder of several nodes must be on a file system with hard links; or use an etcd server: "
                "--rdzv-backend etcd-v2 --rdzv-endpoint host:2379",
            ) from error

    def read(self) -> tuple[int, bytes] | None:
        """See `Arbiter`."""
        with _as_lost(self._rosters):
            while True:
                newest = max(self._versions(), default=0)
                self._check_is_the_same(newest)
                if not newest:
                    return None
                if self._newest is not None and self._newest[0] == newest:
                    return self._newest
                try:
                    self._newest = newest, self._file(newest).read_bytes()
                    return self._newest
                except FileNotFoundError:
                    continue  # pruned since: then there are newer ones

    def where(self, version: int) -> str:
        """See `Arbiter`."""
        return str(self._file(version))

    def store(self, version: int, document: bytes) -> bool:
        """See `Arbiter`."""
        with _as_lost(self._rosters):
            self._rosters.mkdir(parents=True, exist_ok=True)
            # Only who sees the version before may add one: a folder that is merely empty decides nothing.
            if max(self._versions(), default=0) != version - 1:
                return False
            temporary = self._rosters / f".{os.getpid()}.{secrets.token_hex(8)}"
            _write_durably(temporary, document)
            try:
                won = self._link(temporary, version)
            finally:
                temporary.unlink()
            # A version that was pruned long ago can be linked again. It counts only if nothing newer is there.
            versions = self._versions()
            won = won and max(versions, default=version) == version
            if won:
                self._prune(versions)
            return won

    def _check_is_the_same(self, newest: int) -> None:
        """Versions never go away, so a folder with older ones than before is another one: its mount is gone."""
        if self._newest is not None and newest < self._newest[0]:
            raise ArbiterLost(
                f"{self._rosters} is not what it was: version {self._newest[0]} is gone",
                hint="look at the mount of the run folder",
            )

    def _link(self, temporary: Path, version: int) -> bool:
        try:
            os.link(temporary, self._file(version))
        except FileExistsError:
            # Over NFS the reply to a link that succeeded may be lost and the request sent again: count the names.
            return os.stat(temporary).st_nlink == 2
        return True

    def _prune(self, versions: list[int]) -> None:
        for version in sorted(versions)[:-KEEP_VERSIONS]:
            self._file(version).unlink(missing_ok=True)

    def _versions(self) -> list[int]:
        try:
            names = os.listdir(self._rosters)
        except FileNotFoundError:
            return []
        return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]

    def _file(self, version: int) -> Path:
        return self._rosters / f"{version}.json"

    def beat(self, node: str, counter: int) -> None:
        """See `Arbiter`. The text has a fixed width and is overwritten in place: a reader never sees it empty."""
        with _as_lost(self._nodes):
            try:
                descriptor = os.open(self._nodes / node, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                self._nodes.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._nodes / node, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, f"{counter:020d}\n".encode())
            finally:
                os.close(descriptor)

    def counters(self, nodes: Iterable[str]) -> dict[str, str]:
        """See `Arbiter`."""
        found: dict[str, str] = {}
        with _as_lost(self._nodes):
            for node in nodes:
                with contextlib.suppress(FileNotFoundError):
                    found[node] = (self._nodes / node).read_text().strip()
        return found

    def forget(self, node: str) -> None:
        """See `Arbiter`."""
        with _as_lost(self._nodes):
            (self._nodes / node).unlink(missing_ok=True)


@contextlib.contextmanager
def _as_lost(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArbiterLost(
            f"the job's folder {folder} did not answer: {error.strerror or error}",
            hint="every node of a job needs the same run folder, readable and writable",
        ) from error


def _write_durably(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
