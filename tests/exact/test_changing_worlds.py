"""Three epochs on 2, 1, 3 and again 2 workers, with kills all along: each epoch is the dataset, sample by sample."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from tests.exact.mishaps import Mishap, script_of
from tests.launching import Elastic, Outcome

WORLDS = (2, 1, 3, 2)
EPOCHS = 3
SIZE = 216
BATCH = 6
"""A multiple of every number of workers: whatever is behind them, the rest can be dealt out evenly."""

BODY = """
from elastic_fit.callbacks import session

CONTEXT = session.current().context
SIZE, OPTIONS = {size}, {options!r}


class Numbered(torch.utils.data.Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return torch.full((4,), index / SIZE), index


class Seen(Model):
    def training_step(self, batch, batch_idx):
        samples = ",".join(str(int(index)) for index in batch[1])
        when = f"{{CONTEXT.generation}}:{{CONTEXT.attempt}}:{{self.global_step}}"
        note("samples", f"{{when}}:{{self.trainer.current_epoch}}:{{self.trainer.world_size}}:{{samples}}")
        return self.layer(batch[0]).square().mean()

    def train_dataloader(self):
        return DataLoader(Numbered(), batch_size={batch}, shuffle=True, **OPTIONS)


pl.seed_everything(7)
trainer(*MISHAPS, max_epochs={epochs}).fit(Seen())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one rank's training step was given."""

    attempt: tuple[int, int]
    """Generation, and attempt in it: in order of time."""
    step: int
    """Optimizer steps that were done before."""
    epoch: int
    ranks: int
    samples: list[int]

    @classmethod
    def parse(cls, text: str) -> Batch:
        generation, attempt, step, epoch, ranks, samples = text.split(":")
        return cls(
            attempt=(int(generation), int(attempt)),
            step=int(step),
            epoch=int(epoch),
            ranks=int(ranks),
            samples=[int(one) for one in samples.split(",")],
        )


def consumed(outcome: Outcome) -> list[Batch]:
    """The batches that are in the parameters at the end.

    An attempt's steps are, as far as no later attempt began before them: that one did not know of them.
    """
    batches = [Batch.parse(text) for text in outcome.notes("samples")]
    begins = {one.attempt: min(other.step for other in batches if other.attempt == one.attempt) for one in batches}
    return [
        one for one in batches if all(one.step < begin for attempt, begin in begins.items() if attempt > one.attempt)
    ]


def epochs_of(batches: list[Batch]) -> list[Counter[int]]:
    epochs = [Counter[int]() for _ in range(EPOCHS)]
    for batch in batches:
        epochs[batch.epoch].update(batch.samples)
    return epochs


def drawn_out(one: int, middle: int, three: int) -> list[Mishap]:
    """In every world one worker or all are killed, and the run is stopped; at steps that depend on the arguments."""
    return [
        Mishap(step=one, moment="on_after_backward", act="die", rank=1),
        Mishap(step=one + 2, moment="on_before_optimizer_step", act="die", rank=None),
        Mishap(step=one + 4, moment="on_train_batch_end", act="stop", rank=0),
        Mishap(step=middle, moment="on_before_backward", act="die", rank=0),
        Mishap(step=middle + 3, moment="on_train_batch_end", act="stop", rank=0),
        Mishap(step=three, moment="on_train_batch_end", act="die", rank=2),
        Mishap(step=three + 2, moment="on_train_batch_start", act="die", rank=None),
        Mishap(step=three + 4, moment="on_train_batch_end", act="stop", rank=1),
        Mishap(step=three + 8, moment="on_train_batch_end", act="fall_over", rank=0),
        Mishap(step=three + 10, moment="on_after_backward", act="die", rank=0),
    ]


def run_through_the_worlds(elastic: Elastic, body: str, mishaps: list[Mishap], *flags: str) -> Outcome:
    script = script_of(body, mishaps)
    for workers in WORLDS[:-1]:
        outcome = elastic(script, "--max-restarts", "9", *flags, workers=workers)
        assert outcome.code == 75, outcome.said + outcome.output()[-4000:]
    outcome = elastic(script, "--max-restarts", "9", *flags, workers=WORLDS[-1])
    assert outcome.code == 0, outcome.said + outcome.output()[-4000:]
    return outcome


@pytest.mark.parametrize(
    ("steps", "flags", "options"),
    [
        ((3, 12, 23), ("--checkpoint-steps", "1"), {}),
        ((4, 14, 26), ("--checkpoint-steps", "3"), {"num_workers": 2}),
        ((5, 17, 28), ("--checkpoint-steps", "5"), {}),
    ],
    ids=["each step saved", "prefetched", "steps repeated"],
)
def test_each_epoch_is_the_dataset_whoever_is_killed_in_whatever_world(
    steps: tuple[int, int, int], flags: tuple[str, ...], options: dict[str, object], elastic: Elastic
) -> None:
    body = BODY.format(size=SIZE, options=options, batch=BATCH, epochs=EPOCHS)
    mishaps = drawn_out(*steps)
    outcome = run_through_the_worlds(elastic, body, mishaps, *flags)
    assert len(outcome.events("workers_started")) == 1 + len(mishaps), "a mishap did not come about"
    batches = consumed(outcome)
    assert {one.ranks for one in batches} == set(WORLDS)
    assert epochs_of(batches) == [Counter(range(SIZE))] * EPOCHS
