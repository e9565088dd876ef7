"""Trainings with a gate before their optimizers' steps, on CPUs: the device's queue is the script's to say."""

from __future__ import annotations

from tests.launching import Elastic

GATED = """
from elastic_fit.callbacks import gate, run_checkpoint
from elastic_fit.callbacks.emergency import StepGuard

class Place:
    is_reached = True
    def record(self): pass
    def query(self): return Place.is_reached
    def synchronize(self): pass

def told_gate(device, break_off):
    def break_and_tell():
        note("broken", os.environ["RANK"])
        break_off()
    return gate.Gate(Place, break_and_tell)

run_checkpoint.gate_for = told_gate
gate.REST_S = gate.SETTLE_S = 0.2
"""


def test_peer_that_dies_is_survived_by_the_state_behind_the_gate(elastic: Elastic) -> None:
    outcome = elastic(GATED + "trainer(At(5, die, rank=1), max_epochs=1).fit(Model())\n")
    assert outcome.code == 0, outcome.said
    assert [one["step"] for one in outcome.events("rescue")] == [5]
    assert sum(one["steps"] for one in outcome.events("steps_repeated")) == 0


def test_device_that_hangs_within_a_step_is_not_rescued(elastic: Elastic) -> None:
    body = """
    class Hangs(pl.Callback):
        def on_exception(self, *_):
            Place.is_reached = False  # the queue has not come to the end of the last step

    trainer(At(5, die, rank=1), Hangs(), max_epochs=1).fit(Model())
    """
    outcome = elastic(GATED + body.replace("\n    ", "\n"), "--checkpoint-steps", "3")
    assert outcome.code == 0, outcome.said
    assert outcome.events("rescue") == []
    (told,) = outcome.events("no_rescue")
    assert "in the middle of an optimizer step" in told["why"]
    assert (told["safe_step"], told["lost"]) == (3, 2)
    assert outcome.notes("broken") == ["0"]


def test_script_that_catches_what_its_training_raises_trains_on_with_the_same_group(elastic: Elastic) -> None:
    body = """
    one = trainer(At(5, fall_over), max_epochs=1)
    try:
        one.fit(Model())
    except RuntimeError:
        note("caught", os.environ["RANK"])
    trainer(max_epochs=1).fit(Model())
    """
    outcome = elastic(GATED + body.replace("\n    ", "\n"))
    assert outcome.code == 0, outcome.said
    assert sorted(outcome.notes("caught")) == ["0", "1"]
    assert outcome.notes("broken") == []


def test_what_hangs_in_a_hook_after_the_step_costs_no_step(elastic: Elastic) -> None:
    """The step is whole and counted; the peer dies while this rank waits for it in a callback."""
    body = """
    import torch.distributed as dist

    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if ATTEMPT == 0 and trainer.global_step == 5:
                die() if RANK == 1 else dist.barrier()

    trainer(Asks(), max_epochs=1).fit(Model())
    """
    outcome = elastic(GATED + body.replace("\n    ", "\n"))
    assert outcome.code == 0, outcome.said
    assert [one["step"] for one in outcome.events("rescue")] == [5]
