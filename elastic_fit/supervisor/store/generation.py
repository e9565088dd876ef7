"""Who holds a run: an advisory lock, and a generation number that fences off whoever held it before.

File locks on shared file systems may lie, so the lock only spares people a mistake. What keeps a checkpoint folder
true is the generation: a ticket made by ``link``, which fails where the number is taken. Every commit asks whether a
higher ticket exists.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

import psutil

from elastic_fit.supervisor.errors import FencedOff, RunIsHeld, StorageError
from elastic_fit.supervisor.rundir import Identity, RunDir
from elastic_fit.supervisor.store.disk import Disk, make_folders

if TYPE_CHECKING:
    from filelock import FileLock

MENDED_BY = "look at the permissions of the run folder, and at its disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process, told apart from another one that gets the same pid later."""

    host: str
    pid: int
    started: float
    """When the process began, seconds since the epoch."""
    boot: str
    """The boot of the host that it belongs to."""

    @classmethod
    def this_process(cls) -> Holder:
        """The caller."""
        return cls(host=socket.gethostname(), pid=os.getpid(), started=psutil.Process().create_time(), boot=_boot_id())

    def is_dead(self) -> bool:
        """Whether it is certain that it is gone; a process of another host never is."""
        if self.host != socket.gethostname():
            return False
        if self.boot != _boot_id():
            return True
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 1.0
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Fence(Protocol):
    """Tells whether this process may still commit."""

    def check(self) -> None:
        """Raise FencedOff where a newer generation has taken the run, OSError where that can't be told."""


def check_whether_replaced(fence: Fence) -> None:
    """After storage has refused something: raise FencedOff where a newer generation has taken the run.

    A fence that can't be read either is no reason: what was refused first is to be told.
    """
    with contextlib.suppress(OSError):
        fence.check()


class GenerationFence:
    """Refuses commits once a higher generation exists, or the folder is another run's.

    Args:
        folder: the run's.
        generation: the one that may commit.
        run_id: of the run, whose folder may be set aside, and a new one begun in its place; empty: it isn't looked at.
    """

    def __init__(self, folder: RunDir, generation: int, *, run_id: str = "") -> None:
        self._folder = folder
        self._generation = generation
        self._run_id = run_id

    def check(self) -> None:
        """Raise FencedOff where a newer generation has taken the run, OSError where that can't be told."""
        try:
            newest = _newest(self._folder.generations)
        except FileNotFoundError as error:
            # There was one when this generation was taken. Whoever has moved it away may be newer.
            raise FileNotFoundError(error.errno, f"{self._folder.generations} is gone") from error
        if newest > self._generation:
            raise FencedOff(
                f"generation {self._generation} was replaced by generation {newest}: nothing is committed any more",
                hint="another supervisor has taken over this run",
            )
        if self._run_id and self._folder.read_identity().run_id != self._run_id:
            raise FencedOff(
                f"{self._folder.root} is the folder of another run by now: nothing of this one is committed any more",
                hint="somebody has started over with --fresh",
            )


@dataclass(slots=True)
class Lease:
    """A held run."""

    identity: Identity
    generation: int
    recovered: str | None
    """What was found of an earlier holder that had not let go, in a line."""
    _lock: FileLock
    _record: TextIO
    """The lock's file, in which the holder's name is. Open, for by its path it may be another holder's by now."""

    def release(self) -> None:
        """Let go; the generation stays taken."""
        with contextlib.suppress(OSError), self._record:
            self._record.truncate(0)
        self._lock.release()


def make_generations(tickets: Path) -> None:
    """Make the folder of tickets. Raises StorageError where the disk refuses.

    For every node, before it looks for tickets: on a file system that is shared, one that has seen the folder missing
    goes on seeing that for a while, and its fence would know of no generation.
    """
    try:
        make_folders(tickets, Disk())
    except OSError as error:
        raise StorageError(f"can't make {tickets}: {error.strerror}", hint=MENDED_BY) from error


def newest_generation(tickets: Path) -> int:
    """The highest generation that was taken; 0 where there is none. Raises StorageError where that can't be told."""
    try:
        return _newest(tickets)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"can't read {tickets}: {error.strerror}", hint=MENDED_BY) from error


def _newest(tickets: Path) -> int:
    return max((int(name) for name in os.listdir(tickets) if name.isdigit()), default=0)


def take_generation(tickets: Path, holder: Holder) -> int:
    """Take the next number, for good: it is on the disk. Raises StorageError where the folder can't be written."""
    try:
        with _ticket(tickets, holder) as ticket:
            while True:
                number = _newest(tickets) + 1
                try:
                    os.link(ticket, tickets / f"{number:08d}")
                    return number
                except FileExistsError:
                    continue
    except OSError as error:
        raise StorageError(f"can't take a generation in {tickets}: {error.strerror}", hint=MENDED_BY) from error


def publish_generation(tickets: Path, number: int, holder: Holder) -> bool:
    """Take a number that the nodes of a job have agreed on; False where somebody else has taken that one.

    Raises StorageError where the folder can't be written. A number lower than the newest changes nothing: only the
    highest counts.
    """
    try:
        with _ticket(tickets, holder) as ticket:
            try:
                os.link(ticket, tickets / f"{number:08d}")
            except FileExistsError:
                # Over NFS the reply to a link that succeeded may be lost and the request sent again: count the names.
                return os.stat(ticket).st_nlink == 2
            return True
    except OSError as error:
        what = f"can't take generation {number} in {tickets}"
        raise StorageError(f"{what}: {error.strerror}", hint=MENDED_BY) from error


@contextlib.contextmanager
def _ticket(tickets: Path, holder: Holder) -> Iterator[Path]:
    """A ticket without a number yet. A number that a power cut took back would be given twice, and fence off nobody."""
    disk = Disk()
    make_folders(tickets, disk)
    temporary = tickets / f".{os.getpid()}-{secrets.token_hex(4)}"
    with open(disk.create(temporary), "w") as file:
        file.write(json.dumps({**asdict(holder), "t": time.time()}))
        file.flush()
        disk.sync(file.fileno())
    try:
        yield temporary
    finally:
        disk.unlink(temporary)
        disk.sync_folder(tickets)


def hold(folder: RunDir, *, command: Sequence[str] = ()) -> Lease:
    """Take the run, which begins here where there is none yet: the lock, then its name and the next generation.

    Args:
        folder: the run's.
        command: what starts it.

    Raises RunIsHeld where another live supervisor has it, StorageError or UsageError where the folder refuses.
    """
    while True:
        folder.make()
        try:
            lock = _lock(folder)
            break
        except FileNotFoundError:
            continue  # the folder was moved aside meanwhile
    with contextlib.ExitStack() as failing:
        failing.callback(lock.release)
        before = read_holder(folder.lock)
        me = Holder.this_process()
        # Only under the lock: what has a name and isn't locked is an earlier run, which --fresh moves aside.
        identity = folder.create(command=list(command))
        generation = take_generation(folder.generations, me)
        record = failing.enter_context(folder.lock.open("w"))
        record.write(json.dumps(asdict(me)))
        record.flush()
        failing.pop_all()
    return Lease(identity, generation, _recovery(before), lock, record)


@contextlib.contextmanager
def kept_out(folder: RunDir) -> Iterator[None]:
    """Keep supervisors out of a run meanwhile, without becoming one. Raises RunIsHeld and StorageError."""
    try:
        lock = _lock(folder)
    except FileNotFoundError as error:
        raise StorageError(f"can't lock {folder.lock}: {error.strerror}", hint=MENDED_BY) from error
    try:
        yield
    finally:
        lock.release()


def set_aside(folder: RunDir) -> Path | None:
    """Move a run's folder to a free name beside it; None where there was none. Raises as `hold` does."""
    folder.check_is_run()
    while not folder.is_unused():
        try:
            lock = _lock(folder)
        except FileNotFoundError:
            continue  # somebody else was first
        try:
            return folder.set_aside()
        finally:
            lock.release()
    return None


def _lock(folder: RunDir) -> FileLock:
    """The lock of the run that is there by now, taken.

    Raises RunIsHeld, StorageError where it can't be taken, and FileNotFoundError where the folder isn't there, or was
    moved aside meanwhile, and the lock with it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder.lock, mode=0o600)
    try:
        before = os.stat(folder.root)
        lock.acquire(timeout=0)
        if os.path.samestat(before, os.stat(folder.root)):
            return lock
    except Timeout:
        raise refusal(folder) from None
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"can't lock {folder.lock}: {error.strerror}", hint=MENDED_BY) from error
    lock.release()
    raise FileNotFoundError(errno.ENOENT, "moved aside", str(folder.root))


def refusal(folder: RunDir) -> RunIsHeld:
    """What whoever finds the run's lock taken is told."""
    return RunIsHeld(
        f"the run {folder.root} is held by {read_holder(folder.lock) or 'others: nodes of a job, or a command'}",
        hint="wait for it to end, or give this run another folder with --run-dir",
    )


def _recovery(before: Holder | None) -> str | None:
    if before is None:
        return None
    state = "which is gone" if before.is_dead() else "whose lock had lapsed"
    return f"took over from {before}, {state}"


def read_holder(lock: Path) -> Holder | None:
    """Who has a run alone, or had it and never let go; None where it doesn't say."""
    try:
        return Holder(**json.loads(lock.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))
