"""Each sample once an epoch, whoever is killed and however many ranks there are; and the proof that a user can run."""

from __future__ import annotations

import os

from elastic_fit.supervisor.store import CheckpointStore
from tests.launching import Elastic, Outcome

SCRIPT = """
class Seen(Model):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = torch.nn.Dropout(dropout)

    def training_step(self, batch, batch_idx):
        note("samples", f"{self.trainer.current_epoch}:{self.global_step}:{RANK}:{batch[1].tolist()}".replace(" ", ""))
        return self.layer(self.dropout(batch[0])).square().mean()

    def on_train_end(self):
        note("weights", [self.layer.weight.tolist(), self.layer.bias.tolist()].__repr__().replace(" ", ""))

    def train_dataloader(self):
        data = TensorDataset(torch.arange(96).reshape(24, 4) / 96, torch.arange(24))
        return DataLoader(data, batch_size=2, shuffle=True)

pl.seed_everything(7)
"""


def seen(outcome: Outcome) -> dict[int, list[int]]:
    """Samples by epoch. Of a step that was done twice, the second time counts."""
    steps: dict[tuple[int, int, int], list[int]] = {}
    for line in outcome.notes("samples"):
        epoch, step, rank, samples = line.split(":")
        steps[int(epoch), int(step), int(rank)] = [int(one) for one in samples.strip("[]").split(",")]
    epochs: dict[int, list[int]] = {}
    for (epoch, _, _), samples in steps.items():
        epochs.setdefault(epoch, []).extend(samples)
    return epochs


EACH_ONCE = list(range(24))


def test_a_killed_worker_costs_no_sample(elastic: Elastic) -> None:
    outcome = elastic(SCRIPT + "trainer(At(4, die, rank=1)).fit(Seen())\n")
    assert outcome.code == 0
    assert {epoch: sorted(samples) for epoch, samples in seen(outcome).items()} == {0: EACH_ONCE, 1: EACH_ONCE}


def test_every_manifest_says_how_many_samples_of_the_epoch_are_behind_it(elastic: Elastic) -> None:
    outcome = elastic(SCRIPT + "trainer(At(9, die)).fit(Seen())\n", "--checkpoint-steps", "2", "--keep", "20")
    assert outcome.code == 0
    store = CheckpointStore(outcome.run / "checkpoints" / "fit-1")
    told = {one.manifest.step: (one.manifest.epoch, one.manifest.samples) for one in store.committed()}
    assert told == {2: (0, 8), 4: (0, 16), 6: (0, 24), 8: (1, 8), 10: (1, 16), 12: (1, 24)}


def test_all_workers_killed_cost_no_sample(elastic: Elastic) -> None:
    outcome = elastic(SCRIPT + "trainer(At(9, die)).fit(Seen())\n", "--checkpoint-steps", "2")
    assert outcome.code == 0
    assert {epoch: sorted(samples) for epoch, samples in seen(outcome).items()} == {0: EACH_ONCE, 1: EACH_ONCE}


def test_each_sample_once_when_the_number_of_workers_changes_within_an_epoch(elastic: Elastic) -> None:
    body = SCRIPT + "trainer(At(3, fall_over), At(8, fall_over), max_epochs=2).fit(Seen())\n"
    flags = ("--checkpoint-steps", "1", "--max-restarts", "0")
    assert elastic(body, *flags, workers=2).code == 1
    middle = body.replace("At(3, fall_over), ", "")
    assert elastic(middle, *flags, workers=3).code == 1
    last = elastic(SCRIPT + "trainer(max_epochs=2).fit(Seen())\n", *flags, workers=1)
    assert last.code == 0, last.output()
    everything = [one for samples in seen(last).values() for one in samples]
    assert {one: everything.count(one) for one in EACH_ONCE} == dict.fromkeys(EACH_ONCE, 2)


def test_epochs_after_the_one_in_which_ranks_were_lost_are_whole(elastic: Elastic) -> None:
    flags = ("--checkpoint-steps", "1", "--max-restarts", "0")
    body = SCRIPT + "trainer(At(7, fall_over), max_epochs=4).fit(Seen())\n"
    assert elastic(body, *flags, workers=3).code == 1
    last = elastic(SCRIPT + "trainer(max_epochs=4).fit(Seen())\n", *flags, workers=2)
    assert last.code == 0, last.output()
    assert {epoch: sorted(samples) for epoch, samples in seen(last).items()} == dict.fromkeys(range(4), EACH_ONCE)


def weights(elastic: Elastic, body: str, *flags: str) -> list[str]:
    outcome = elastic(SCRIPT + body, "--fresh", *flags)
    assert outcome.code == 0, outcome.output()
    return outcome.notes("weights")[-2:]


def test_a_run_that_lost_all_its_workers_ends_with_the_same_parameters(elastic: Elastic) -> None:
    flags = ("--checkpoint-steps", "1")
    calm = weights(elastic, "trainer().fit(Seen(dropout=0.4))\n", *flags)
    assert weights(elastic, "trainer(At(5, die)).fit(Seen(dropout=0.4))\n", *flags) == calm
    assert calm[0] == calm[1]


def test_reproducible_makes_a_survivors_rescue_bit_exact(elastic: Elastic) -> None:
    calm = weights(elastic, "trainer().fit(Seen(dropout=0.4))\n", "--reproducible")
    rescued = weights(elastic, "trainer(At(5, die, rank=1)).fit(Seen(dropout=0.4))\n", "--reproducible")
    assert rescued == calm


def test_accumulated_batches_of_a_step_that_never_came_are_taken_again(elastic: Elastic) -> None:
    halfway = """
class Halfway(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if ATTEMPT == 0 and RANK == 1 and batch_idx == 4 and WHEN:
            die()

trainer(Halfway(), accumulate_grad_batches=3).fit(Seen())
"""
    calm = weights(elastic, "WHEN = False\n" + halfway)
    assert weights(elastic, "WHEN = True\n" + halfway) == calm


def test_an_epoch_after_one_that_lost_ranks_is_whole_when_a_survivor_saves_between_them(elastic: Elastic) -> None:
    flags = ("--checkpoint-steps", "1")
    before = SCRIPT + "trainer(At(2, fall_over), max_epochs=3).fit(Seen())\n"
    assert elastic(before, *flags, "--max-restarts", "0", workers=3).code == 1
    last = elastic(SCRIPT + "trainer(At(5, fall_over, rank=0), max_epochs=3).fit(Seen())\n", *flags, workers=2)
    assert last.code == 0, last.output()
    assert {epoch: sorted(samples) for epoch, samples in seen(last).items() if epoch} == {1: EACH_ONCE, 2: EACH_ONCE}


def test_a_stop_within_a_validation_keeps_averaged_weights_and_those_that_are_trained_apart(elastic: Elastic) -> None:
    body = f"""
import os
from lightning.pytorch.callbacks import EMAWeightAveraging

class Validated(Seen):
    def validation_step(self, batch, batch_idx):
        pass
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(1200, 4)), batch_size=2)

class Within(pl.Callback):
    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if WHEN and trainer.global_step == 6 and batch_idx == 2:
            told(lambda: os.kill({os.getpid()}, signal.SIGTERM))()

trainer(EMAWeightAveraging(decay=0.7), Within()).fit(Validated())
"""
    calm = weights(elastic, "WHEN = False\n" + body)
    stopped = elastic(SCRIPT + "WHEN = True\n" + body, "--fresh")
    assert (stopped.code, stopped.steps()) == (75, [6])
    again = elastic(SCRIPT + "WHEN = False\n" + body)
    assert again.code == 0, again.output()
    assert again.notes("weights")[-2:] == calm
