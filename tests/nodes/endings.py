"""How a story over several nodes has to end: finished, samples exact, nobody left behind, one story in the ledger."""

from __future__ import annotations

from elastic_fit import ElasticSampler
from elastic_fit.supervisor.ledger import read
from tests.nodes.cluster import Cluster, Launched
from tests.nodes.fit import SAMPLES, SEED


def assert_it_ends_well(cluster: Cluster, *launched: Launched, repeats: bool = False, server: str = "") -> None:
    """End the training that `fit.py` does under `launched`, all of them alive, and look at what there is then.

    `repeats`: whether steps may have been done twice (those since the last checkpoint, where nobody could rescue).
    `server`: a host on which something else runs.
    """
    last = cluster.end_soon()
    codes = [one.process.wait(90) for one in launched]
    assert codes == [0] * len(launched), cluster.story()
    assert_steps_are_exact(cluster, last, repeats=repeats)
    assert_samples_are_exact(cluster)
    assert_one_world_at_a_time(cluster)
    assert_one_story(cluster, *launched)
    for host in {f"h{number}" for number in range(1, cluster.count + 1)} - {server}:
        cluster.wait_until(lambda host=host: not cluster.processes(host), 10)


def assert_steps_are_exact(cluster: Cluster, last: int, *, repeats: bool) -> None:
    assert repeats or cluster.repeated() == [], cluster.story()
    assert {step["step"] for step in cluster.steps()} == set(range(1, last + 1))
    wrong = [(step["step"], step["count"], step["rank"]) for step in cluster.steps() if step["count"] != step["step"]]
    assert not wrong, f"the parameters have lost steps: (step, count, rank) {wrong[:12]}"


def assert_samples_are_exact(cluster: Cluster) -> None:
    """The epoch's order up to where the training ended, each sample once, whatever the worlds were."""
    taken = cluster.samples()
    order = list(ElasticSampler(range(SAMPLES), seed=SEED, num_replicas=1, rank=0))
    assert sorted(taken) == sorted(order[: len(taken)])


def assert_one_world_at_a_time(cluster: Cluster) -> None:
    """No step of one world was done after the first step of a later one."""
    ports = [step["port"] for step in sorted(cluster.steps(), key=lambda step: step["t"])]
    changes = [port for port, before in zip(ports, [None, *ports]) if port != before]
    assert len(changes) == len(set(changes)), f"two sides trained at once: {changes}"


def assert_one_story(cluster: Cluster, *launched: Launched) -> None:
    """Each round was formed once, by one node, and all nodes tell the same."""
    events = read(cluster.run_dir / "events.jsonl")
    rounds = [event["generation"] for event in events if event.event == "membership" and event["change"] == "round"]
    assert rounds == sorted(set(rounds)), f"rounds under these generations: {rounds}"
    worked = [event["generation"] for event in events if event.event == "workers_started"]
    assert set(worked) <= set(rounds)
    assert worked == sorted(worked), f"workers started under these generations: {worked}"
    closing = {line for one in launched for line in one.lines() if "(exit" in line}
    assert len(closing) == 1, f"all nodes tell the same end: {closing}"
    # One line a round at most, the same on all nodes that were in it.
    told = {line for one in launched for line in one.lines() if " nodes    " in line}
    assert len(told) <= len(rounds), f"{told} of {len(rounds)} rounds"
