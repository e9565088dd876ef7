"""What a store is doing when it is interrupted: each story has something acknowledged before, and one act.

Torch-free, and a program as well: ``python stories.py NAME FOLDER`` acts in a folder where `prepare` has been.
"""

from __future__ import annotations

import functools
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.store import Checkpoint, CheckpointStore, Disk, Facts
from elastic_fit.supervisor.store.commit import Staged

BEGIN, DONE = "begin", "acknowledged"
PIECE = 3000
"""Bytes per write: three of them make a file, so that files end and begin in the middle of a page."""
LARGE_PIECE = 6_000_001
"""The same, of a file that fills two of the buffers which a thread of its own stores, and begins a third."""


@functools.cache
def content(step: int, shard: str = "", piece: int = PIECE) -> tuple[bytes, ...]:
    """The pieces of a file, different for each step and shard."""
    return tuple(random.Random(f"{step}/{shard}/{number}").randbytes(piece) for number in range(3))


def write(staged: Staged, step: int, shards: tuple[str, ...], piece: int) -> None:
    if shards:
        staged.mkdir()
    for shard in shards or ("",):
        with staged.open_part(shard) if shards else staged.open() as file:
            for data in content(step, shard, piece):
                file.write(data)


def save(
    store: CheckpointStore,
    step: int,
    name: str = "",
    *,
    shards: tuple[str, ...] = (),
    generation: int = 1,
    piece: int = PIECE,
) -> str:
    name = name or f"step={step}.ckpt"
    with store.stage(name) as staged:
        write(staged, step, shards, piece)
        staged.commit(Facts(step=step, generation=generation, branch=store.branch, extra={"piece": piece}))
    return name


def is_intact(checkpoint: Checkpoint) -> bool:
    """Whether every byte is what was saved at the step that the manifest tells."""
    path, step, piece = checkpoint.path, checkpoint.manifest.step, checkpoint.manifest.extra["piece"]
    if path.is_dir():
        return {one.name for one in path.iterdir()} == set(SHARDS) and all(
            (path / shard).read_bytes() == b"".join(content(step, shard, piece)) for shard in SHARDS
        )
    return path.read_bytes() == b"".join(content(step, piece=piece))


SHARDS = ("__0_0.distcp", "__1_0.distcp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Something that a store does."""

    prepare: Callable[[CheckpointStore], object]
    act: Callable[[CheckpointStore], object]
    before: int | None
    """The step of the newest acknowledged checkpoint before; None where there is none."""
    after: int
    """That after the act is acknowledged."""
    names: frozenset[str]
    """What the folder holds in the end, manifests left out."""
    spared: frozenset[str] = frozenset()
    """What it may hold as well while the act is not acknowledged."""


def _saved(*steps: int, shards: tuple[str, ...] = ()) -> Callable[[CheckpointStore], object]:
    return lambda store: [save(store, step, shards=shards) for step in steps]


def _let_go(store: CheckpointStore) -> None:
    for step in (10, 20):
        store.remove(f"step={step}.ckpt")


def _linked(store: CheckpointStore) -> None:
    _saved(10, 20)(store)
    store.link_last("step=10.ckpt")


def replacing(shards: tuple[str, ...] = (), piece: int = PIECE) -> Story:
    return Story(
        prepare=lambda store: save(store, 10, "last.ckpt", shards=shards, piece=piece),
        act=lambda store: save(store, 20, "last.ckpt", shards=shards, piece=piece),
        before=10,
        after=20,
        names=frozenset({"last.ckpt"}),
    )


STORIES = {
    "a file": Story(
        prepare=_saved(10),
        act=_saved(20),
        before=10,
        after=20,
        names=frozenset({"step=10.ckpt", "step=20.ckpt"}),
    ),
    "a folder of two shards": Story(
        prepare=_saved(10, shards=SHARDS),
        act=_saved(20, shards=SHARDS),
        before=10,
        after=20,
        names=frozenset({"step=10.ckpt", "step=20.ckpt"}),
    ),
    "a file in place of another": replacing(),
    "a folder in place of another": replacing(SHARDS),
    "the first save of all": Story(
        prepare=lambda store: None, act=_saved(20), before=None, after=20, names=frozenset({"step=20.ckpt"})
    ),
    "two files let go": Story(
        prepare=_saved(10, 20, 30),
        act=_let_go,
        before=30,
        after=30,
        names=frozenset({"step=30.ckpt"}),
        spared=frozenset({"step=10.ckpt", "step=20.ckpt"}),
    ),
    "two folders let go": Story(
        prepare=_saved(10, 20, 30, shards=SHARDS),
        act=_let_go,
        before=30,
        after=30,
        names=frozenset({"step=30.ckpt"}),
        spared=frozenset({"step=10.ckpt", "step=20.ckpt"}),
    ),
    "the swap of last.ckpt": Story(
        prepare=_linked,
        act=lambda store: store.link_last("step=20.ckpt"),
        before=20,
        after=20,
        names=frozenset({"step=10.ckpt", "step=20.ckpt", "last.ckpt"}),
    ),
}
LARGE = "a file of several buffers"
STORED_BY_A_THREAD = {
    LARGE: Story(
        prepare=_saved(10),
        act=lambda store: save(store, 20, piece=LARGE_PIECE),
        before=10,
        after=20,
        names=frozenset({"step=10.ckpt", "step=20.ckpt"}),
    )
}
"""What costs too much to be interrupted in every way that the others are."""


def store_in(folder: Path, disk: Disk | None = None, generation: int = 1) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", disk=disk, generation=generation)


def main(name: str, folder: str) -> None:
    say(BEGIN)
    try:
        {**STORIES, **STORED_BY_A_THREAD}[name].act(store_in(Path(folder)))
    except StorageError as error:
        say(f"failed: {error.message}")
        return
    say(DONE)


def say(text: str) -> None:
    """By a system call that no store makes: those that it makes are counted."""
    os.writev(1, [f"{text}\n".encode()])


if __name__ == "__main__":
    main(*sys.argv[1:])
