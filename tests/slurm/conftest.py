"""One cluster for all stories, and what a story needs of it."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from elastic_fit.supervisor.ledger import Event, read
from tests.slurm.cluster import Slurm

COMMAND = str(Path(sys.executable).with_name("elastic-fit"))
FIT = str(Path(__file__).parents[1] / "nodes" / "fit.py")
STEP_S = 0.05


class Story:
    """One job and its folder.

    Args:
        slurm: the cluster.
        folder: where the job's log, its run folder and its script's notes are.
        size: how many nodes it is told of.
    """

    def __init__(self, slurm: Slurm, folder: Path, size: int = 1) -> None:
        self.slurm = slurm
        self.folder = folder
        self.size = size
        self.job = ""
        self._arguments: tuple[str, ...] = ()
        """The script's."""
        self._run_dir: Path | None = None
        self.lent: list[str] = []
        """Further jobs that were submitted to add nodes to this one."""
        folder.mkdir(exist_ok=True)

    def submit(self, *flags: str, steps: int, step_s: float = STEP_S) -> None:
        """``elastic-fit slurm --submit``, as a user types it."""
        self._arguments = (str(self.folder), str(steps), str(step_s))
        self.job = self._submit(*flags)

    def submit_more(self, *flags: str) -> str:
        """The same, for nodes that are added to the job; returns the id of the job that lends them."""
        self.lent.append(self._submit("--join", f"runs/fit-{self.job}", *flags))
        return self.lent[-1]

    def _submit(self, *flags: str) -> str:
        command = (COMMAND, "slurm", FIT, "--partition=low", "--submit", *flags, *self._arguments)
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": ""}
        return self.slurm.command(*command, cwd=self.folder, env=environment).strip()

    def submit_script(self, text: str, *options: str) -> None:
        """``sbatch`` of a user's own script."""
        path = self.folder / "job.sh"
        path.write_text(f"#!/bin/bash\n{text}\n")
        said = self.slurm.command("sbatch", "--parsable", "--partition=low", *options, str(path), cwd=self.folder)
        self.job = said.strip()

    def end_soon(self) -> int:
        """Have the training end in a second or so; returns the last step."""
        last: int = max(step["step"] for step in self.steps()) + 25
        temporary = self.folder / "last-step.tmp"
        temporary.write_text(str(last))
        temporary.rename(self.folder / "last-step")
        return last

    def task(self, number: int) -> Story:
        """One task of an array that was submitted, whose script notes in a folder of its own."""
        task = Story(self.slurm, self.folder / str(number))
        task.job = f"{self.job}_{number}"
        task.run_dir = self.folder / "runs" / f"fit-{self.job}-{number}"
        return task

    def hold(self, place: str) -> None:
        """From now on, who comes to that place of the script waits there."""
        (self.folder / f"hold-{place}").touch()

    def let_go(self, place: str) -> None:
        """Those who wait there go on."""
        (self.folder / f"hold-{place}").unlink()

    def warn(self) -> None:
        """What SLURM does before the time limit of a job with ``--signal=B:USR1@...``."""
        self.slurm.command("scancel", "--batch", "--signal=USR1", self.job)

    # what is seen

    @property
    def state(self) -> str:
        return self.slurm.job(self.job)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.slurm.job(self.job)["Restarts"])

    @property
    def nodes(self) -> list[str]:
        """The nodes that the job has now; the first is the one that its batch script runs on."""
        text = self.slurm.job(self.job)["NodeList"]
        return [] if text == "(null)" else self.slurm.command("scontrol", "show", "hostnames", text).split()

    @property
    def run_dir(self) -> Path:
        return self._run_dir or self.folder / "runs" / f"fit-{self.job}"

    @run_dir.setter
    def run_dir(self, path: Path) -> None:
        self._run_dir = path

    def events(self, name: str) -> list[Event]:
        return [event for event in read(self.run_dir / "events.jsonl") if event.event == name]

    def causes(self) -> list[str | None]:
        """Why the job was started, each time."""
        return [event["cause"] for event in self.events("incarnation")]

    def requeues(self) -> list[tuple[str, str]]:
        """What was decided about putting the job back, each time, and the cause."""
        return [(event["action"], event["cause"]) for event in self.events("requeue")]

    def notes(self, name: str) -> list[dict[str, Any]]:
        """What the script's ranks have noted, in the order noted."""
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[dict[str, Any]]:
        """All steps that any rank has done."""
        return self.notes("steps")

    def trains(self, *, world: int, starts: int | None = None) -> bool:
        """Whether a world of that size has done some steps, in the given start of the job (from 1)."""
        if starts is not None and len(self.events("incarnation")) < starts:
            return False
        since = self.events("incarnation")[-1].t if self.events("incarnation") else 0.0
        return sum(step["world"] == world and step["t"] > since for step in self.steps()) > 10 * world

    def text(self) -> str:
        """What the job and its launchers have said."""
        logs = "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))
        return f"job {self.job}: {self.slurm.job(self.job)['JobState']}\n{logs[-12_000:]}"

    def says(self, text: str) -> bool:
        """Whether the job or one of its launchers has said that."""
        return any(text in path.read_text(errors="replace") for path in self.folder.glob("*.log"))

    # what is waited for, and checked

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 180.0) -> float:
        return self.slurm.wait_until(condition, timeout_s, self.text)

    def finish(self, timeout_s: float = 300.0) -> None:
        """Wait for the job's end, which must be a good one, and see that nothing of it is left."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait_until(lambda: self.state in ends, timeout_s)
        assert self.state == "COMPLETED", self.text()

    def assert_each_step_once(self, steps: int) -> None:
        done = Counter(step["step"] for step in self.steps() if step["rank"] == 0)
        assert sorted(done) == list(range(1, steps + 1)), self.text()
        assert [step for step, times in done.items() if times > 1] == [], "steps were done twice"
        assert all(step["count"] == step["step"] for step in self.steps()), "the parameter counts the steps"

    def assert_only_the_last_were_done_twice(self, steps: int, most: int) -> None:
        """What was done since the last checkpoint, `most` steps at most, was lost and done again, once."""
        done = Counter(step["step"] for step in self.steps() if step["rank"] == 0)
        twice = [step for step, times in done.items() if times > 1]
        assert set(done) == set(range(1, steps + 1)), self.text()
        assert len(twice) <= most
        assert max(done.values()) <= 2
        assert all(step - 1 in twice for step in twice[1:]), "one stretch of them"
        assert all(step["count"] == step["step"] for step in self.steps()), "the parameter counts the steps"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    with Slurm(Path(f"/tmp/efs-{os.getpid()}")) as slurm:
        yield slurm


@pytest.fixture
def story(slurm: Slurm, tmp_path: Path) -> Iterator[Story]:
    story = Story(slurm, tmp_path / "job")
    yield story
    cancel(story)


@pytest.fixture
def both(slurm: Slurm, tmp_path: Path) -> Iterator[list[Story]]:
    """The same on one node and on two, side by side."""
    stories = [Story(slurm, tmp_path / f"job-on-{size}", size) for size in (1, 2)]
    yield stories
    for story in stories:
        cancel(story)


@pytest.fixture
def lost(slurm: Slurm) -> Iterator[list[str]]:
    """Nodes that the test takes away; they are there again after it."""
    nodes: list[str] = []
    yield nodes
    for node in nodes:
        slurm.start_node(node)


def cancel(story: Story) -> None:
    for job in filter(None, (story.job, *story.lent)):
        story.slurm.command("scancel", "--quiet", job)


def side_by_side(tell: Callable[[Story], None], stories: Sequence[Story]) -> None:
    """Tell of each in a thread of its own: most of a story is waiting for SLURM."""
    with ThreadPoolExecutor(len(stories)) as pool:
        for told in [pool.submit(tell, story) for story in stories]:
            told.result()
