"""How the nodes of a job hold their run together: each has a share of the lock that a supervisor alone has whole.

As long as one of them lives, nobody takes the run alone, or moves its folder away. That, too, only spares people a
mistake: where locks lie, or there are none, the generation fences, and the nodes' own roster says whether they live.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store.generation import MENDED_BY, read_holder, refusal

HANDOVER_S = 5.0
"""How long a lock may be held by somebody who doesn't say who it is: it has it for a moment, or has just got it."""
PATIENCE_S = 30.0
"""How long nodes of an earlier job may be on their way out before the folder isn't theirs any more."""
PAUSE_S = 0.1
TAKEN = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What `flock` says on file systems that know no locks, such as Lustre as it is often mounted."""


@dataclass(slots=True)
class Share:
    """A node's share of a run."""

    _descriptor: int | None
    """The lock's file, open; None on a file system that knows no locks."""

    def forget_the_dead(self) -> None:
        """Nobody has the run alone: who is named in the lock's file as its holder is gone."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)

    def release(self) -> None:
        """Let go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def share(folder: RunDir) -> Share:
    """Take part in the run of a job of several nodes; its folder is made where it is missing.

    Raises RunIsHeld where a supervisor alone has it, StorageError or UsageError where the folder refuses.
    """
    until = time.monotonic() + HANDOVER_S
    while True:
        folder.make()
        try:
            taken = _try(folder.lock)
            if taken is not None:
                taken.forget_the_dead()
        except FileNotFoundError:
            continue  # the folder was moved aside meanwhile
        except OSError as error:
            raise StorageError(f"can't lock {folder.lock}: {error.strerror}", hint=MENDED_BY) from error
        if taken is not None:
            return taken
        if read_holder(folder.lock) is not None or time.monotonic() >= until:
            raise refusal(folder)
        time.sleep(PAUSE_S)


def is_shared(folder: RunDir) -> bool:
    """Whether nodes live that have a share of the run; False also where that can't be told."""
    try:
        for how in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            taken = _try(folder.lock, how, make=False)
            if taken is not None:
                taken.release()
                return how == fcntl.LOCK_SH
    except OSError:
        pass  # no lock, or none of ours to look at: whoever takes it is told
    return False


def start_over(folder: RunDir, has_begun: Callable[[bool], bool]) -> Path | None:
    """Move the folder of an earlier run aside, for a job of several nodes: once, by whichever of them is first.

    Args:
        folder: the run's.
        has_begun: whether the job has begun there already; it is told whether nodes live there that have a share.

    None where it has, or where there was nothing. Raises as `share` does, also where an earlier job's nodes stay.
    """
    until = time.monotonic() + PATIENCE_S
    folder.check_is_run()
    while not folder.is_unused():
        try:
            alone = _try(folder.lock, fcntl.LOCK_EX)
            others = None if alone is not None else _try(folder.lock)
        except FileNotFoundError:
            continue  # somebody else was first
        except OSError as error:
            raise StorageError(f"can't lock {folder.lock}: {error.strerror}", hint=MENDED_BY) from error
        try:
            # Whoever has the lock whole may move the folder away at any moment: then there is nothing to be seen in it.
            if (alone is not None or others is not None) and has_begun(others is not None):
                return None
            if alone is not None:
                return folder.set_aside()
        finally:
            for one in (alone, others):
                if one is not None:
                    one.release()
        if (others is None and read_holder(folder.lock) is not None) or time.monotonic() >= until:
            raise refusal(folder)
        time.sleep(PAUSE_S)
    return None


def _try(lock: Path, how: int = fcntl.LOCK_SH, *, make: bool = True) -> Share | None:
    """A share of what is the lock at that path by now, or all of it; None where others keep that from us.

    Raises FileNotFoundError where its folder was moved aside meanwhile.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    descriptor = os.open(lock, flags, 0o600)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(lock)):
            raise FileNotFoundError(errno.ENOENT, "moved aside", str(lock))
    except OSError as error:
        os.close(descriptor)
        if error.errno in NO_LOCKS:
            return Share(None)
        if error.errno in TAKEN:
            return None
        raise
    return Share(descriptor)
