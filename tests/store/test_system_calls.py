"""The same crashes by the kernel's hand: SIGKILL, or an error, at every system call that a save makes."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.store import stories
from tests.store.aftermath import Tally
from tests.store.stories import BEGIN, DONE, LARGE, STORED_BY_A_THREAD, STORIES, store_in

pytestmark = pytest.mark.system

CHANGING = "write pwrite64 fsync fdatasync sync_file_range ftruncate rename renameat renameat2 link linkat symlink"
CHANGING += " symlinkat unlink unlinkat mkdir mkdirat rmdir openat"
INTERRUPTIBLE = ("write", "fsync", "openat")
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "EINTR")
WHOLE = {**STORIES, **STORED_BY_A_THREAD}
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
CALL = re.compile(r"^(\d+) +(\w+)\((.*)")


@dataclass(frozen=True)
class Call:
    """The `nth` call of that name that a thread makes."""

    name: str
    nth: int
    main_only: bool
    """Whether it is the main thread's, and another thread may make as many."""
    changes: bool
    """Whether it may change the disk; else it opens something to read it."""

    def may_fail_with(self, error: str) -> bool:
        """Whether the kernel may say that."""
        if error == "EINTR":
            return self.changes and self.name in INTERRUPTIBLE
        return self.changes or error in ("EIO", "EMFILE")


def traced(name: str, folder: Path, *options: str, main_only: bool = False) -> subprocess.CompletedProcess[str]:
    """Act the story under strace, which counts each thread's calls for itself."""
    followed = [] if main_only else ["-f", "--seccomp-bpf"]
    strace = ["strace", *followed, "-qq", "-o", str(folder / "trace"), *options]
    command = [*strace, sys.executable, stories.__file__, name, str(folder)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def calls_of(name: str, folder: Path) -> list[Call]:
    """Every call that may change the disk or opens a file, between the beginning of the act and its acknowledgement."""
    WHOLE[name].prepare(store_in(folder))
    done = traced(name, folder, "-e", f"trace=writev,{CHANGING.replace(' ', ',')}")
    assert done.stdout.splitlines() == [BEGIN, DONE], done.stderr
    lines = [match for line in (folder / "trace").read_text().splitlines() if (match := CALL.match(line))]
    main = lines[0][1]
    has_threads = any(line[1] != main for line in lines)
    counts: Counter[tuple[str, str]] = Counter()
    found: list[Call] = []
    acting = False
    for thread, call, arguments in (line.groups() for line in lines):
        if call == "writev" and DONE in arguments:
            return found
        counts[thread, call] += 1
        if acting:
            nth = counts[thread, call]
            assert thread == main or counts[main, call] < nth, "an injection would meet the main thread"
            changes = call != "openat" or "O_CREAT" in arguments
            found.append(Call(call, nth, main_only=has_threads and thread == main, changes=changes))
        acting = acting or (call == "writev" and BEGIN in arguments)
    raise AssertionError("the program has not said that it was done")


def outcomes(
    name: str, memory: Path, injections: Iterable[tuple[Call, str]]
) -> Iterator[tuple[str, Path, subprocess.CompletedProcess[str]]]:
    """Act the story anew for each call and what it meets with; gives that, the folder, and what the program said."""
    WHOLE[name].prepare(store_in(memory / "prepared"))

    def act(number: int, injection: tuple[Call, str]) -> tuple[str, Path, subprocess.CompletedProcess[str]]:
        call, what = injection
        folder = memory / str(number)
        shutil.copytree(memory / "prepared", folder, symlinks=True)
        inject = f"inject={call.name}:{what}:when={call.nth}"
        return what, folder, traced(name, folder, "-e", inject, main_only=call.main_only)

    with ThreadPoolExecutor(2) as threads:
        for what, folder, done in threads.map(act, itertools.count(), injections):
            yield what, folder, done
            shutil.rmtree(folder)


@pytest.fixture
def folder(memory: Path) -> Path:
    for name in ("whole", "prepared"):
        (memory / name).mkdir()
    return memory


@pytest.mark.parametrize("name", WHOLE)
def test_sigkill_at_every_system_call_loses_nothing(name: str, folder: Path, tally: Tally) -> None:
    calls = [call for call in calls_of(name, folder / "whole") if call.changes]
    assert len(calls) >= 3
    assert name != LARGE or sum(call.name == "write" and not call.main_only for call in calls) == 32
    for _, copy, done in outcomes(name, folder, [(call, "signal=KILL") for call in calls]):
        assert done.stdout.splitlines() == [BEGIN], "it died before it could acknowledge"
        tally.survive(WHOLE[name], copy, acknowledged=False)


@pytest.mark.parametrize("name", WHOLE)
def test_an_error_from_every_system_call_is_told_and_loses_nothing(name: str, folder: Path, tally: Tally) -> None:
    """EINTR is what no program may see: the call is simply made again."""
    calls = calls_of(name, folder / "whole")
    injections = [(call, f"error={error}") for call in calls for error in ERRORS if call.may_fail_with(error)]
    for what, copy, done in outcomes(name, folder, injections):
        begin, outcome = done.stdout.splitlines()
        assert begin == BEGIN
        assert outcome == DONE or os.strerror(getattr(errno, what.removeprefix("error="))) in outcome
        assert what != "error=EINTR" or outcome == DONE
        assert "Traceback" not in done.stderr
        tally.survive(WHOLE[name], copy, acknowledged=outcome == DONE)
