"""Process trees: who descends from us, and ending all of it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent is gone; ends at once if it already is.

    Args:
        parent: the pid that is expected as the parent.

    The kernel sends the signal when the *thread* that forked us ends, so the parent must fork from its main thread.
    """
    if sys.platform != "linux":
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(signal.SIGKILL + 128)


def adopt_orphans() -> None:
    """Make this process the new parent of descendants whose own parent dies, so that none gets out of sight."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """All living processes below `pid` (this process by default), nearest first; zombies are left out."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in found if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill_group(leader: int) -> None:
    """SIGKILL everything in the process group that `leader` leads; nothing happens if there is none."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def kill_descendants(*, rounds: int = 50) -> int:
    """SIGKILL all that descends from this process until nothing is left; returns how many were killed.

    A process may fork while we look, so we look again after every kill, at most `rounds` times.
    """
    killed = 0
    for _ in range(rounds):
        left = descendants()
        if not left:
            break
        for process in left:
            try:
                process.kill()
                killed += 1
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=0.2)
    return killed


def signal_name(code: int) -> str | None:
    """Name of the signal that an exit code speaks of (-9 or 137 -> ``SIGKILL``), or None."""
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return None
