"""A stop that comes while no worker runs: the nodes that are left are waiting for others, or for the next attempt."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_fit.supervisor.ledger import read
from tests.nodes.cluster import wait_until
from tests.nodes.test_one_node import start


class Nodes:
    """Launchers side by side on this host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[subprocess.Popen[str]] = []

    def start(self, nodes: str, *flags: str) -> subprocess.Popen[str]:
        job = start(self.folder, nodes, 100_000, *flags)
        self.jobs.append(job)
        return job

    def wait_until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, 90)

    def train(self, world: int) -> bool:
        """Whether that many ranks have done a step."""
        steps = self.folder / "steps.jsonl"
        return steps.exists() and all(f'"rank": {rank}' in steps.read_text() for rank in range(world))

    def has_noted(self, event: str, **fields: object) -> bool:
        events = read(self.folder / "run" / "events.jsonl")
        return any(one.event == event and fields.items() <= one.fields.items() for one in events)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path / "job")
    yield made
    for job in made.jobs:
        job.kill()
        job.communicate()


@pytest.mark.slow
def test_node_that_waits_for_its_minimum_after_a_loss_can_be_stopped(nodes: Nodes) -> None:
    first, second = nodes.start("2:2"), nodes.start("2:2")
    nodes.wait_until(lambda: nodes.train(4))
    second.kill()
    nodes.wait_until(lambda: nodes.has_noted("membership", change="lost"))
    nodes.wait_until(lambda: nodes.has_noted("rescue"))
    assert first.stderr is not None
    while "1 of at least 2 nodes are here" not in (line := first.stderr.readline()):
        assert line, "it has ended instead of waiting"
    first.send_signal(signal.SIGTERM)
    _, text = first.communicate(timeout=10)
    assert first.returncode == 75, text
