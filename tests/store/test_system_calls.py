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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.store import stories
from tests.store.aftermath import Tally
from tests.store.stories import BEGIN, DONE, STORIES, store_in

pytestmark = pytest.mark.system

CHANGING = "write pwrite64 writev fsync fdatasync ftruncate rename renameat renameat2 link linkat symlink symlinkat"
CHANGING += " unlink unlinkat mkdir mkdirat rmdir openat"
ERRING = ("a file in place of another", "a folder of two shards", "two folders let go", "the swap of last.ckpt")
"""The stories in which every call fails with every error."""
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
CALL = re.compile(r"^\d+ +(\w+)\((.*)")


@dataclass(frozen=True)
class Call:
    """The `nth` call of that name that the program makes."""

    name: str
    nth: int


def traced(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Act the story under strace."""
    strace = ["strace", "--seccomp-bpf", "-f", "-qq", "-o", str(folder / "trace"), *options]
    command = [*strace, sys.executable, stories.__file__, name, str(folder)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def calls_of(name: str, folder: Path) -> list[Call]:
    """Every call that may change the disk, between the beginning of the act and its acknowledgement."""
    STORIES[name].prepare(store_in(folder))
    done = traced(name, folder, "-e", f"trace={CHANGING.replace(' ', ',')}")
    assert done.stdout.splitlines() == [BEGIN, DONE], done.stderr
    counts: Counter[str] = Counter()
    found: list[Call] = []
    acting = False
    for line in (folder / "trace").read_text().splitlines():
        match = CALL.match(line)
        if match is None:
            continue
        counts[match[1]] += 1
        if match[2].startswith(f'1, "{DONE}'):
            return found
        if acting and (match[1] != "openat" or "O_CREAT" in match[2]):
            found.append(Call(match[1], counts[match[1]]))
        acting = acting or match[2].startswith(f'1, "{BEGIN}')
    raise AssertionError("the program has not said that it was done")


def each(name: str, folder: Path) -> Iterator[tuple[Call, Path]]:
    """Every call, with a folder in which the story is prepared."""
    calls = calls_of(name, folder / "whole")
    assert len(calls) >= 3
    STORIES[name].prepare(store_in(folder / "prepared"))
    for number, call in enumerate(calls):
        copy = folder / str(number)
        shutil.copytree(folder / "prepared", copy, symlinks=True)
        yield call, copy


@pytest.fixture
def folder(memory: Path) -> Path:
    for name in ("whole", "prepared"):
        (memory / name).mkdir()
    return memory


@pytest.mark.parametrize("name", STORIES)
def test_sigkill_at_every_system_call_loses_nothing(name: str, folder: Path, tally: Tally) -> None:
    def kill(call: Call, copy: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
        return copy, traced(name, copy, "-e", f"inject={call.name}:signal=KILL:when={call.nth}")

    with ThreadPoolExecutor(2) as threads:
        for copy, done in threads.map(lambda one: kill(*one), each(name, folder)):
            assert done.stdout.splitlines() == [BEGIN], "it died before it could acknowledge"
            tally.survive(STORIES[name], copy, acknowledged=False)


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "EINTR"])
def test_an_error_from_every_system_call_is_told_and_loses_nothing(error: str, memory: Path, tally: Tally) -> None:
    """EINTR is what no program may see of a write: it is simply made again."""

    def fail(name: str, call: Call, copy: Path) -> tuple[str, Path, subprocess.CompletedProcess[str]]:
        return name, copy, traced(name, copy, "-e", f"inject={call.name}:error={error}:when={call.nth}")

    def injections() -> Iterator[tuple[str, Call, Path]]:
        for name in ERRING:
            for kind in ("whole", "prepared"):
                (memory / name / kind).mkdir(parents=True)
            for call, copy in each(name, memory / name):
                if error != "EINTR" or call.name in ("write", "openat", "fsync"):
                    yield name, call, copy

    with ThreadPoolExecutor(2) as threads:
        for name, copy, done in threads.map(lambda one: fail(*one), injections()):
            begin, outcome = done.stdout.splitlines()
            assert begin == BEGIN
            assert outcome == DONE or os.strerror(getattr(errno, error)) in outcome
            assert error != "EINTR" or outcome == DONE
            assert "Traceback" not in done.stderr
            tally.survive(STORIES[name], copy, acknowledged=outcome == DONE)


def test_a_process_out_of_descriptors_tells_it_and_loses_nothing(memory: Path, tally: Tally) -> None:
    """EMFILE wherever a file is opened, to read as well as to write."""
    story = STORIES["a folder of two shards"]
    name = "a folder of two shards"
    for number in itertools.count():
        copy = memory / str(number)
        story.prepare(store_in(copy))
        trace = traced(name, copy, "-e", "trace=openat,write")
        lines = [match for line in (copy / "trace").read_text().splitlines() if (match := CALL.match(line))]
        begin = next(n for n, match in enumerate(lines) if match[2].startswith(f'1, "{BEGIN}'))
        before = sum(match[1] == "openat" for match in lines[:begin])
        total = sum(match[1] == "openat" for match in lines)
        assert trace.returncode == 0
        shutil.rmtree(copy)
        story.prepare(store_in(copy))
        nth = before + 1 + number
        if nth > total:
            break
        done = traced(name, copy, "-e", f"inject=openat:error=EMFILE:when={nth}")
        assert "Traceback" not in done.stderr
        tally.survive(story, copy, acknowledged=DONE in done.stdout)
