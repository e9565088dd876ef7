"""A rank dies over its gradients' sums: some are there, one is half-way, and nothing of the step may be kept."""

from __future__ import annotations

import textwrap

import pytest
import torch

from elastic_fit.launch.workers import Nursery
from tests.launching import Elastic
from tests.stop.test_rescue import State, script, state, undisturbed_run

BUCKETS = 4
WIDE = 2**18
SUMS = f"""
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

class Sums(Victim):
    '''Sums up one parameter's gradients at a time, {BUCKETS} of them.'''
    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(4, {WIDE // 4})
        self.under_way = []
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean() + self.wide(batch[0]).square().mean()
    def on_train_start(self):
        self.trainer.strategy.model.register_comm_hook(self, Sums.add_up)
    def on_train_batch_start(self, batch, batch_idx):
        self.under_way = []
    def add_up(self, bucket):
        gradients = bucket.buffer().div_(dist.get_world_size())
        if bucket.index() == 2 and self.is_due("between two sums"):
            for one in self.under_way:
                one.wait()
            note("summed", len(self.under_way))
            die()
        self.under_way.append(dist.all_reduce(gradients, async_op=True))
        if gradients.numel() == {WIDE} and self.is_due("in a sum"):
            note("left", {BUCKETS} - len(self.under_way))
            die()
        return self.under_way[-1].get_future().then(lambda done: done.value()[0])
Victim = Sums
options = {{"strategy": DDPStrategy(bucket_cap_mb=1e-6)}}
make = trainer
def trainer(*callbacks, **rest):
    return make(*callbacks, **options, **rest)
"""


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[int, State]:
    """The state after step 5, and at the end, of a run that nobody disturbs."""
    run_dir = undisturbed_run(nursery, tmp_path_factory.mktemp("undisturbed"), SUMS)
    return {step: state(run_dir, step) for step in (5, 8)}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("point", ["in a sum", "between two sums"])
def test_death_over_the_sums_of_gradients_leaves_the_state_before_them_and_the_same_end(
    elastic: Elastic, undisturbed: dict[int, State], point: str, victim: int
) -> None:
    fit = "trainer(max_epochs=1).fit(Victim())\n"
    outcome = elastic(script(point, victim, textwrap.dedent(SUMS)) + fit, "--keep", "9")
    assert outcome.code == 0, outcome.said
    # Others come after the one that is half-way, so that no survivor can have all of them.
    assert outcome.notes("summed") == (["2"] if point == "between two sums" else [])
    assert [0 < int(left) < BUCKETS for left in outcome.notes("left")] == ([True] if point == "in a sum" else [])
    (rescue,) = outcome.events("rescue")
    assert (rescue["step"], rescue["rank"]) == (5, 1 - victim)
    assert [one["steps"] for one in outcome.events("steps_repeated")] == [0]
    for step, expected in undisturbed.items():
        torch.testing.assert_close(state(outcome.run, step), expected, rtol=0, atol=0)
