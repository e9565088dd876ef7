"""A disk that refuses for good, or until its owner helps: the training goes on, and the last checkpoint stays.

Real file systems, each of which fails by the kernel's hand.
"""

from __future__ import annotations

import errno
import os
import pickle
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.filesystems import FileSystem
from tests.launching import Elastic

pytestmark = pytest.mark.system

EVERY_STEP_ONCE = [str(step) for step in range(1, 17)]
FAILS_AT_4 = "trainer(At(4, lambda: system.{fails}, rank=0)).fit(Model())\n"
LASTING = {
    "ext4 that finds itself damaged": ("ext4", "find_an_error()", errno.EROFS),
    "ext4 whose disk is gone": ("ext4", "cut(NOTHING_FLUSHED)", errno.EIO),
    "xfs whose disk is gone": ("xfs", "cut(NOTHING_FLUSHED)", errno.EIO),
}


def script(system: FileSystem, body: str) -> str:
    """A script of `body`, to which the file system is known as `system`."""
    known = f"""
import pickle, sys
sys.path.append({str(Path(__file__).parents[2])!r})
from tests.filesystems import NOTHING_FLUSHED
system = pickle.loads({pickle.dumps(system)!r})
"""
    return known + textwrap.dedent(body)


Make = Callable[[str, str], FileSystem]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[FileSystem] = []

    def make(kind: str, place: str) -> FileSystem:
        made.append(FileSystem(kind, tmp_path, tmp_path / place))
        return made[-1]

    yield make
    for system in made:
        system.umount()


@pytest.mark.parametrize("how", LASTING)
def test_checkpoints_on_a_disk_that_fails_for_good_end_no_training(how: str, elastic: Elastic, make: Make) -> None:
    kind, fails, error = LASTING[how]
    system = make(kind, "run/checkpoints")
    first = elastic(script(system, FAILS_AT_4.format(fails=fails)), "--checkpoint-steps", "3")
    assert first.code == 74, first.output()
    assert first.notes("trained") == EVERY_STEP_ONCE
    failed = first.events("save_failed")
    assert [event["step"] for event in failed] == [6, 8, 9, 12, 15, 16, 16]
    for event in failed:
        assert event["error"].endswith(os.strerror(error))
        assert event["error"] in first.output()
    assert f"a save failed: {failed[-1]['error']}" in first.said
    assert "its end is not on disk" in first.said
    system.come_back()
    assert first.steps() == [3], "what was acknowledged before the disk failed"
    second = elastic("trainer().fit(Model())\n")
    assert second.code == 0
    assert second.notes("trained")[16:] == EVERY_STEP_ONCE[3:]
    assert "a save failed" not in second.said, "those of the first start are not this one's"


@pytest.mark.parametrize("how", LASTING)
def test_a_run_whose_whole_folder_fails_for_good_trains_to_its_end_and_says_what_is_lacking(
    how: str, elastic: Elastic, make: Make
) -> None:
    kind, fails, error = LASTING[how]
    system = make(kind, "run")
    first = elastic(script(system, FAILS_AT_4.format(fails=fails)), "--checkpoint-steps", "3")
    assert first.code == 74, first.said
    assert first.notes("trained") == EVERY_STEP_ONCE
    assert "its end is not on disk" in first.said
    assert f"the ledger lacks what came last: {os.strerror(error)}" in first.said
    system.come_back()
    assert first.steps() == [3]
    second = elastic("trainer().fit(Model())\n")
    assert second.code == 0, second.said
    assert second.notes("trained")[16:] == EVERY_STEP_ONCE[3:]


def test_a_stop_on_a_disk_that_is_gone_ends_as_one_with_nothing_new_saved(elastic: Elastic, make: Make) -> None:
    """How long a save takes stands in the ledger, which can't be read."""
    system = make("ext4", "run")
    body = """
    gone = At(4, lambda: system.cut(NOTHING_FLUSHED), rank=0)
    stopped = At(5, told(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer(gone, stopped).fit(Model())
    """
    outcome = elastic(script(system, body), "--checkpoint-steps", "3")
    assert outcome.code == 143, outcome.said
    assert outcome.notes("trained")[-1] in ("5", "6", "7")
    system.come_back()
    assert outcome.steps() == [3]


def test_a_quota_that_is_used_up_costs_checkpoints_while_it_holds(elastic: Elastic, make: Make) -> None:
    system = make("btrfs", "run/checkpoints")
    body = """
    begins = At(4, lambda: system.begin_quota("16K"), rank=0)
    ends = At(12, system.end_quota, rank=0)
    trainer(begins, ends).fit(Model())
    """
    outcome = elastic(script(system, body), "--checkpoint-steps", "3")
    assert outcome.code == 0, outcome.output()
    assert outcome.notes("trained") == EVERY_STEP_ONCE
    failed = outcome.events("save_failed")
    assert [event["step"] for event in failed] == [6, 8, 9]
    for event in failed:
        assert event["error"].endswith(os.strerror(errno.EDQUOT))
        assert event["error"] in outcome.output()
        assert f"a save failed: {event['error']}" in outcome.said
    assert max(outcome.steps()) == 16
