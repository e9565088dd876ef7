"""Checkpoints in an object store, by the same protocol: the manifest is written last and is the commit.

There are no renames there, and none are needed: an object appears whole when its upload completes, or not at all.

1. What has the name already, if it was committed, is copied to another name within the store, manifest last; then it is
   deleted, manifest first. From here on the name isn't valid, and the copy is.
2. The data is uploaded to its name, in parts, its digest computed as the bytes pass by. It appears on condition that
   nothing has that name.
3. The manifest is put, on the same condition. *It is the commit; nothing before it may be read as valid.*
4. The copy is deleted, manifest first.

The fence is asked before each request that takes something away or makes something valid. Whoever is paused between the
two is too late for what appears under a free name: these requests carry their condition with them. A deletion can't.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import xxhash

from elastic_fit.supervisor.errors import FencedOff, StorageError
from elastic_fit.supervisor.store.digest import LeftOff, never
from elastic_fit.supervisor.store.folder import NO_FENCE, Checkpoint, CheckpointStore
from elastic_fit.supervisor.store.generation import Fence, check_whether_replaced
from elastic_fit.supervisor.store.manifest import (
    MAX_BYTES,
    SUFFIX,
    Facts,
    FileEntry,
    Manifest,
    ManifestError,
    aside_name,
    check_relative,
    split_aside,
)
from elastic_fit.supervisor.store.objects import Objects, Url
from elastic_fit.supervisor.store.staging import SaveFailed, Staging
from elastic_fit.supervisor.store.stream import DigestingStream
from elastic_fit.supervisor.store.verify import Verdict, judged, unsealed

PART_BYTES = 64 << 20
"""Size of an upload's parts. S3 takes 10,000 of them, so this allows for checkpoints of up to 640 GB."""
READ_BYTES = 8 << 20
READS_AHEAD = 4
MARK = ".deleting"
"""How the object is called that tells: this checkpoint is being deleted, or is to be once it has a successor."""


class ObjectStream(DigestingStream):
    """A new object, uploaded front to back."""

    def __init__(self, objects: Objects, name: str, part_bytes: int, fence: Fence) -> None:
        super().__init__("")
        self._fence = fence
        self._objects = objects
        self._name = name
        self.upload = objects.upload(name, part_bytes)

    def _put(self, view: memoryview) -> None:
        self.upload.put(view)

    def _finish(self, *, whole: bool) -> None:
        if not whole:
            self.upload.give_up()
            return
        try:
            self._check_fence()
            self._complete()
        except OSError as error:
            self.failure = error
            raise

    def _check_fence(self) -> None:
        try:
            self._fence.check()
        except (FencedOff, OSError):
            self.upload.give_up()
            raise

    def _complete(self) -> None:
        try:
            self.upload.complete()
        except FileExistsError:
            # A client that repeats a request whose answer was lost finds what it has uploaded itself.
            if _digest(self._objects, self._name, self._objects.size(self._name)) != self.hexdigest():
                raise


class RemoteStaged(Staging[Url]):
    """A checkpoint that is being uploaded."""

    def __init__(self, root: Url, name: str, objects: Objects, *, fence: Fence, generation: int, part: int) -> None:
        super().__init__(root, name, fence=fence, generation=generation)
        self._objects = objects
        self._part_bytes = part
        self._stream: ObjectStream | None = None
        self._aside: str | None = None

    @property
    def failure(self) -> OSError | None:
        """See `Staging`."""
        return self._stream.failure if self._stream else None

    def open(self) -> ObjectStream:
        """Upload it. SaveFailed where the store refuses, FencedOff where a newer generation has taken the run."""
        with self.failing():
            self._fence.check()
            if self._objects.exists(self._name + SUFFIX):
                self._aside = self._set_aside()
            elif self._objects.exists(self._name):  # of a save that was interrupted
                delete(self._objects, self._name, self._fence)
            self._stream = ObjectStream(self._objects, self._name, self._part_bytes, self._fence)
        return self._stream

    def _set_aside(self) -> str | None:
        """Copy what has this name, under which it stays valid until the new one is committed."""
        verdict = verify_object(self.target, deep=False)
        aside = None
        if verdict.valid and verdict.manifest is not None:
            aside = aside_name(self._name, f"{self._generation}-{secrets.token_hex(4)}")
            self._objects.put_new(mark_of(aside), b"until its successor is committed")
            self._objects.copy(self._name, aside)
            self._objects.put_new(aside + SUFFIX, verdict.manifest.to_bytes())
        delete(self._objects, self._name, self._fence)
        return aside

    def commit(self, facts: Facts) -> Checkpoint:
        """Make it valid.

        Raises FencedOff where a newer generation has taken the run, SaveFailed where the store refuses.
        """
        if self._stream is None:
            raise ValueError("nothing was written")
        with self.failing():
            self._stream.close()
            manifest = manifest_of(self._name, facts, self._stream.entry())
            self._fence.check()
            self._put_manifest(manifest)
            self._withdraw_if_fenced_off(manifest)
            self._committed = True
            if self._aside is not None:
                delete(self._objects, self._aside, NO_FENCE)  # a name that nobody else has
                self._objects.delete(mark_of(self._aside))
        return Checkpoint(path=self.target, manifest=manifest)

    def _put_manifest(self, manifest: Manifest) -> None:
        try:
            self._objects.put_new(self._name + SUFFIX, manifest.to_bytes())
        except FileExistsError:
            if not self._is_there(manifest):  # else this client has repeated a request whose answer was lost
                raise

    def _withdraw_if_fenced_off(self, manifest: Manifest) -> None:
        """A newer generation may have come between the check and the put: nobody was told of this one yet."""
        try:
            self._fence.check()
        except (FencedOff, OSError):
            if self._is_there(manifest):
                self._objects.delete(self._name + SUFFIX)
            raise

    def _is_there(self, manifest: Manifest) -> bool:
        """Whether the name has this manifest, and not that of another save."""
        return self._objects.read(self._name + SUFFIX, 0, MAX_BYTES) == manifest.to_bytes()

    def discard(self) -> None:
        """Remove what is staged, unless it was committed, or the name may be a newer generation's by now."""
        if self._committed or self._stream is None:
            return
        # What stays is in nobody's way: it has no manifest.
        with contextlib.suppress(OSError, FencedOff):
            self._stream.abandon()
            if self._stream.upload.is_visible and not self._objects.exists(self._name + SUFFIX):
                delete(self._objects, self._name, self._fence)


class RemoteStore(CheckpointStore):
    """A folder of checkpoints in an object store. Each is one object; folders of shards are for file systems.

    One writer at a time: under the launcher its generation sees to that, which is looked up before each request that
    takes something away or makes something valid, and after each commit.

    Args:
        root: a URL that fsspec knows, such as ``s3://bucket/run``.
        fence: asked before every commit whether this process may still write.
        generation: fencing number of the writer.
        part_bytes: size of an upload's parts, and of the memory that one takes two or three times.
    """

    root: Url  # type: ignore[assignment]

    def __init__(
        self, root: Url | str, *, fence: Fence = NO_FENCE, generation: int = 0, part_bytes: int = PART_BYTES
    ) -> None:
        self.root = Url(str(root).rstrip("/"))
        self._fence = fence
        self.generation = generation
        self.branch = 0
        self._part_bytes = part_bytes
        self._objects = Objects(self.root)

    def stage(self, name: str) -> RemoteStaged:  # type: ignore[override]
        """Begin a checkpoint of that name."""
        check_relative(name)
        return RemoteStaged(
            self.root,
            name,
            self._objects,
            fence=self._fence,
            generation=self.generation,
            part=self._part_bytes,
        )

    def join(self, name: str, path: Path) -> RemoteStaged:  # type: ignore[override]
        """Refused: several ranks write one folder of shards only in a file system. Raises StorageError."""
        raise StorageError(f"{self.root} can't take shards", hint="save sharded checkpoints to a file system")

    def candidates(self) -> list[Url]:  # type: ignore[override]
        """Everything that has the name of a checkpoint or of a manifest."""
        try:
            found = self._objects.names()
        except OSError as error:
            raise StorageError(f"can't read {self.root}: {error.strerror or error}") from error
        names = {name.removesuffix(SUFFIX) for name in found if name.endswith((".ckpt", SUFFIX))}
        return [self.root / name for name in sorted(names) if not name.startswith(".")]

    def remove(self, name: str) -> None:
        """Delete a checkpoint: manifest first, then data. What is interrupted is finished by a `sweep`."""
        try:
            delete_for_good(self._objects, name, self._fence)
        except OSError as error:
            check_whether_replaced(self._fence)
            raise StorageError(f"can't delete {self.root / name}: {error.strerror or error}") from error

    def link_last(self, name: str, link: str = "last.ckpt") -> None:
        """Make `link` a copy of a checkpoint, within the store: it has no symlinks, and every tool can open a copy."""
        verdict = verify_object(self.root / name, deep=False)
        if not verdict.valid or verdict.manifest is None:
            raise StorageError(f"{self.root / name} can't be copied to {link}: {verdict.why}")
        try:
            delete(self._objects, link, self._fence)
            self._fence.check()
            self._objects.copy(name, link)
            self._fence.check()
            self._objects.put_new(link + SUFFIX, replace(verdict.manifest, name=link).to_bytes())
        except OSError as error:
            check_whether_replaced(self._fence)
            raise SaveFailed(self.root / link, error) from error

    def sweep(self) -> list[str]:
        """Finish the deletions that were interrupted; returns what they were of. See `leftovers`."""
        dealt_with = []
        try:
            for name in self.leftovers():
                if self._is_wanted(name):
                    if split_aside(name):
                        continue  # until its successor is committed
                else:
                    delete(self._objects, name, self._fence)
                self._objects.delete(mark_of(name))
                dealt_with.append(name)
        except OSError as error:
            check_whether_replaced(self._fence)
            raise StorageError(f"can't clean up {self.root}: {error.strerror or error}") from error
        return dealt_with

    def _is_wanted(self, name: str) -> bool:
        """Whether a marked checkpoint is whole, as its deletion hadn't begun or its name was used again, and stays."""
        aside = split_aside(name)
        has_successor = aside is not None and self._objects.exists(aside[0] + SUFFIX)
        return not has_successor and self._objects.exists(name + SUFFIX)

    def leftovers(self) -> list[str]:
        """Checkpoints whose deletion was interrupted. Parts of a broken upload are the bucket's to expire."""
        try:
            marks = [name for name in self._objects.names() if name.startswith(".") and name.endswith(MARK)]
        except OSError as error:
            raise StorageError(f"can't read {self.root}: {error.strerror or error}") from error
        return [name.removeprefix(".").removesuffix(MARK) for name in marks]


def manifest_of(name: str, facts: Facts, entry: FileEntry) -> Manifest:
    """The manifest of a checkpoint that is one object."""
    fields = {each: getattr(facts, each) for each in Facts.__dataclass_fields__}
    return Manifest(**fields, name=name, files=(replace(entry, path=""),))


def delete(objects: Objects, name: str, fence: Fence) -> None:
    """Manifest first, then data, so that nothing half-deleted looks valid. Raises FencedOff before it does harm."""
    for each in (name + SUFFIX, name):
        fence.check()
        objects.delete(each)


def delete_for_good(objects: Objects, name: str, fence: Fence) -> None:
    """Delete what nothing is to take the place of. A mark beside it tells of it until the last of it is gone."""
    fence.check()
    with contextlib.suppress(FileExistsError):
        objects.put_new(mark_of(name), b"deleting")
    delete(objects, name, fence)
    objects.delete(mark_of(name))


def mark_of(name: str) -> str:
    """The object that tells of a deletion."""
    return f".{name}{MARK}"


def verify_object(url: Url, *, deep: bool, is_told: Callable[[], bool] = never) -> Verdict:
    """Check one checkpoint in an object store; with `deep` all of it is downloaded, in bounded memory.

    Raises LeftOff where `is_told` says so.
    """
    objects, name = Objects(url.parent), url.name
    try:
        # On a small object the range is cut short; one byte more than allowed is enough to refuse a large one.
        manifest = Manifest.parse(objects.read(name + SUFFIX, 0, MAX_BYTES + 1))
    except FileNotFoundError:
        return unsealed()
    except (ManifestError, OSError) as error:
        return Verdict(valid=False, why=f"its manifest can't be read: {error}")
    if not manifest.belongs_to(name):
        return Verdict(valid=False, why=f"its manifest is that of {manifest.name}", manifest=manifest)
    return judged(manifest, _fault(objects, name, manifest, deep=deep, is_told=is_told), "deep" if deep else "quick")


def _fault(objects: Objects, name: str, manifest: Manifest, *, deep: bool, is_told: Callable[[], bool]) -> str | None:
    if manifest.is_folder or manifest.files[0].path:
        return "its data is not of the kind that an object store holds"
    entry = manifest.files[0]
    try:
        size = objects.size(name)
        if size != entry.size:
            return f"{name} has {size} bytes, the manifest says {entry.size}"
        if deep and _digest(objects, name, size, is_told) != entry.digest:
            return f"{name} is not what was written: its digest differs"
    except FileNotFoundError:
        return "its data is missing"
    except OSError as error:
        return f"{name} can't be read: {error.strerror or error}"
    return None


def _digest(objects: Objects, name: str, size: int, is_told: Callable[[], bool] = never) -> str:
    digest = xxhash.xxh3_128()
    for chunk in _chunks(objects, name, size):
        if is_told():
            raise LeftOff
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(objects: Objects, name: str, size: int) -> Iterator[bytes]:
    """In order, with some requests under way ahead of the one that is waited for."""
    under_way: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(READS_AHEAD) as threads:
        for start in range(0, size, READ_BYTES):
            if len(under_way) >= READS_AHEAD:
                yield under_way.popleft().result()
            under_way.append(threads.submit(objects.read, name, start, min(size, start + READ_BYTES)))
        while under_way:
            yield under_way.popleft().result()
