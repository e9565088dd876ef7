"""On a GPU: what a device that works behind its process must not cost. NCCL, several ranks on one device."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu.conftest import Job

pytestmark = pytest.mark.gpu

MakeJob = Callable[..., Job]
STEPS = 60


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state after every step of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "record").touch()
    job = Job(folder, "ddp", STEPS, 2).start("--reproducible")
    assert job.end() == [0, 0], job.said
    return folder


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]


def differing(mine: dict[str, torch.Tensor], theirs: Path) -> list[str]:
    """Names of the tensors that are not the same bit for bit."""
    expected = torch.load(theirs, weights_only=True, map_location="cpu")
    assert mine.keys() == expected.keys()
    return [name for name, tensor in mine.items() if not torch.equal(tensor, expected[name])]


def but_statistics(names: list[str]) -> list[str]:
    """Without BatchNorm's: where rank 0 dies before its have gone round, they are those of the rank that saves."""
    return [name for name in names if "running_" not in name]


def final(job: Job) -> dict[str, torch.Tensor]:
    return state_of(job.checkpoints / f"step={STEPS}-final.ckpt")


@pytest.mark.parametrize(
    ("mishap", "saved"),
    [
        ("dies in forward 1 20", {20}),
        ("dies after backward 1 20", {20, 21}),
        ("dies after backward 0 20", {20, 21}),
        ("dies after step 1 20", {19, 20}),
        ("raises 1 20", {20}),
    ],
)
def test_rank_that_dies_leaves_the_state_of_the_last_step_bit_for_bit(
    job: MakeJob, uninterrupted: Path, mishap: str, saved: set[int]
) -> None:
    one = job("ddp", STEPS, mishap=mishap).start("--reproducible", "--keep", "99")
    assert one.end() == [0, 0], one.said
    rescued = [event["step"] for event in one.events("rescue")]
    assert rescued, (one.events("no_rescue"), one.said)
    assert rescued[-1] in saved
    at = rescued[-1]
    assert differing(state_of(one.checkpoints / f"step={at}.ckpt"), uninterrupted / f"state-{at}.pt") == []
    assert sum(event["steps"] for event in one.events("steps_repeated")) <= 1
    assert differing(final(one), uninterrupted / f"state-{STEPS}.pt") == []


@pytest.mark.parametrize("seed", range(4))
def test_rank_killed_at_any_moment_costs_at_most_one_step(job: MakeJob, uninterrupted: Path, seed: int) -> None:
    draw = random.Random(seed)
    one = job("ddp", STEPS).start("--reproducible", "--keep", "99")
    one.wait_until(lambda: one.events("training"))
    time.sleep(draw.uniform(0, 0.3))
    one.kill(draw.randrange(2))
    assert one.end() == [0, 0], one.said
    assert [event for event in one.events("worker_exit") if event["code"] == -9], "it had ended by then"
    for at in {event["step"] for event in one.events("rescue")}:
        rescued = state_of(one.checkpoints / f"step={at}.ckpt")
        assert but_statistics(differing(rescued, uninterrupted / f"state-{at}.pt")) == []
    assert sum(event["steps"] for event in one.events("steps_repeated")) <= 1
    assert but_statistics(differing(final(one), uninterrupted / f"state-{STEPS}.pt")) == []


def test_rank_that_hangs_costs_its_group_s_timeout_and_no_step(job: MakeJob, uninterrupted: Path) -> None:
    one = job("ddp", STEPS, mishap="sleeps 1 20").start("--reproducible", "--keep", "99", COLLECTIVES_S="6")
    assert one.end() == [0, 0], one.said
    assert [event["step"] for event in one.events("rescue")][-1:] == [20], one.said
    assert differing(final(one), uninterrupted / f"state-{STEPS}.pt") == []


def test_state_of_a_replica_group_is_put_together_by_those_who_are_left(job: MakeJob) -> None:
    one = job("hsdp", STEPS, nodes=4, mishap="dies in forward 1 20").start()
    assert one.end() == [0] * 4, one.said
    assert [event["step"] for event in one.events("rescue")] == [20], (one.events("no_rescue"), one.said)
    assert sum(event["steps"] for event in one.events("steps_repeated")) == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp"])
def test_job_that_is_stopped_goes_on_from_the_agreed_step(job: MakeJob, strategy: str) -> None:
    one = job(strategy, 200).start()
    one.wait_until(lambda: one.events("training"))
    one.stop()
    assert one.end() == [75, 75], one.said
    (saved,) = one.events("save")
    assert one.start().end() == [0, 0], one.said
    assert one.events("resume")[-1]["step"] == saved["step"]
    assert sum(event["steps"] for event in one.events("steps_repeated")) == 0


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_shards_go_on_with_another_number_of_ranks(job: MakeJob, strategy: str) -> None:
    one = job(strategy, 200).start()
    one.wait_until(lambda: one.events("training"))
    one.stop()
    assert one.end() == [75, 75], one.said
    one.nodes = 3
    assert one.start().end() == [0] * 3, one.said


@pytest.mark.parametrize("strategy", ["fsdp", "hybrid"])
def test_shards_that_die_with_their_rank_are_told_of(job: MakeJob, strategy: str) -> None:
    nodes = 4 if strategy == "hybrid" else 2
    one = job(strategy, STEPS, nodes=nodes, mishap="dies in forward 1 25").start("--checkpoint-steps", "10")
    assert one.end() == [0] * nodes, one.said
    assert one.events("rescue") == []
    assert {event["safe_step"] for event in one.events("no_rescue")} == {20}
    assert one.events("resume")[-1]["step"] == 20


def test_random_streams_of_a_device_go_on_where_they_were(job: MakeJob) -> None:
    """Dropout is drawn on the device. One rank, without --reproducible: a stop and a start change nothing."""
    whole = job("ddp", STEPS, nodes=1).start()
    assert whole.end() == [0], whole.said
    stopped = job("ddp", STEPS, nodes=1).start()
    stopped.wait_until(lambda: stopped.events("training"))
    stopped.stop()
    assert stopped.end() == [75], stopped.said
    assert stopped.start().end() == [0], stopped.said
    mine, theirs = final(stopped), final(whole)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
