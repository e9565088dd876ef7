"""A script has an ElasticCheckpoint of its own, for its best model: the run goes on from what is saved for the run."""

from __future__ import annotations

import textwrap

import pytest

from tests.launching import Elastic, Outcome
from tests.stop.test_stopping import EVERY_STEP_ONCE, TELL

OWN = """
from elastic_fit import ElasticCheckpoint

class Scored(Model):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss

def fit(*callbacks, **options):
    own = ElasticCheckpoint(dirpath=HERE / "own", monitor="loss", every_n_train_steps=4, **options)
    trainer(own, *callbacks, enable_checkpointing=True).fit(Scored())
"""


def is_gone_on_with(elastic: Elastic, first: Outcome, options: str) -> None:
    assert first.code == 75, first.said + first.output()
    second = elastic(TELL + OWN + f"fit({options})\n")
    assert second.code == 0, second.said + second.output()
    assert second.notes("trained") == EVERY_STEP_ONCE


@pytest.mark.parametrize("options", ["", "resume='auto'"], ids=["", "resume"])
def test_a_stop_saves_for_the_run_where_a_script_has_a_checkpoint_callback_of_its_own(
    elastic: Elastic, options: str
) -> None:
    first = elastic(TELL + OWN + f"fit(At(5, told(to_launcher())), {options})\n")
    assert len(first.steps()) == 1
    is_gone_on_with(elastic, first, options)


def test_a_survivor_saves_for_the_run_once_where_a_script_has_a_checkpoint_callback_of_its_own(
    elastic: Elastic,
) -> None:
    outcome = elastic(TELL + OWN + "fit(At(6, die, rank=1))\n")
    assert outcome.code == 0, outcome.said + outcome.output()
    assert [one["step"] for one in outcome.events("rescue")] == [6]
    assert [event["why"] for event in outcome.events("no_rescue")] == []
    assert outcome.notes("trained") == EVERY_STEP_ONCE


def test_what_a_script_saves_for_itself_is_not_what_a_stopped_run_could_go_on_from(elastic: Elastic) -> None:
    body = """
    def stop_and_die():
        told(to_launcher())()
        die()
    fit(At(4, stop_and_die, hook="on_train_batch_start"))
    """
    outcome = elastic(TELL + OWN + textwrap.dedent(body))
    assert outcome.steps() == []
    assert [one["path"].endswith("own/epoch=0-step=4.ckpt") for one in outcome.events("save")] == [True]
    assert outcome.code == 143, outcome.said


def test_flags_of_the_command_line_hold_where_a_script_has_a_checkpoint_callback_of_its_own(elastic: Elastic) -> None:
    body = """
    class Draws(pl.Callback):
        def on_train_batch_end(self, *_):
            if RANK == 0:
                note("drawn", torch.rand(()).item())
    pl.seed_everything(7)
    fit(DEATHDraws())
    """
    for death, flags in (("", ()), ("At(6, die, rank=1), ", ("--fresh",))):
        script = TELL + OWN + textwrap.dedent(body).replace("DEATH", death)
        outcome = elastic(script, "--reproducible", *flags)
        assert outcome.code == 0, outcome.output()
    drawn = outcome.notes("drawn")
    assert drawn[:16] == drawn[16:]
