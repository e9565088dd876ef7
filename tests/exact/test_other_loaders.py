"""Loaders whose place is not ours to keep: those that keep it themselves, and those that nobody can take up."""

from __future__ import annotations

import os

import pytest

from tests.launching import Elastic

LAUNCHER = os.getpid()

STREAM = """
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.ones(16, 4))

    class Streaming(Model):
        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=2)
    trainer(max_epochs=1).fit(Streaming())
"""

OWN = """
    import time
    class Own:
        '''Goes through this rank's own numbers and knows how far it has come.'''
        def __init__(self):
            self.done = 0
        def __len__(self):
            return 8
        def __iter__(self):
            for number in range(self.done % 8, 8):
                self.done = number + 1
                yield torch.full((1, 4), float(number))
        def state_dict(self):
            return {"done": self.done, "of": RANK}
        def load_state_dict(self, state):
            note(f"state-{RANK}", state["of"])
            self.done = state["done"]

    class Keeping(Model):
        def training_step(self, batch, batch_idx):
            note(f"seen-{RANK}", int(batch[0, 0]))
            time.sleep(0.1)  # a stop finds its place before the end
            return self.layer(batch).square().mean()
        def configure_optimizers(self):
            self.trainer.estimated_stepping_batches
            return super().configure_optimizers()
        def train_dataloader(self):
            return Own()
"""


def test_a_stream_without_state_is_warned_of_with_what_it_costs(elastic: Elastic) -> None:
    outcome = elastic(STREAM)
    assert outcome.code == 0
    told = "its dataset is iterable and keeps no state; after a restart in the middle of an epoch it begins anew"
    assert outcome.output().count(told) == 1, "once, by rank 0"


def test_with_strict_data_a_stream_without_state_is_an_error_before_the_first_step(elastic: Elastic) -> None:
    outcome = elastic(STREAM, "--strict-data", "--max-restarts", "0")
    assert outcome.code == 1
    assert "PositionCannotBeKept" in outcome.said
    assert outcome.notes("trained") == []


def test_a_loader_that_keeps_its_place_is_given_the_state_of_its_own_rank_back(elastic: Elastic) -> None:
    """Also where the script asks for the number of steps, which has the loaders prepared early."""
    stop = f"At(3, lambda: os.kill({LAUNCHER}, signal.SIGTERM), rank=0)"
    body = OWN + f"    trainer({stop}).fit(Keeping())\n"
    first = elastic(body)
    assert first.code == 75
    assert elastic(body).code == 0
    for rank in ("0", "1"):
        assert set(first.notes(f"state-{rank}")) == {rank}
        assert first.notes(f"seen-{rank}") == [str(number) for number in range(8)] * 2


def test_a_survivor_s_state_serves_all_ranks_and_that_is_said(elastic: Elastic) -> None:
    outcome = elastic(OWN + "    trainer(At(3, die, rank=0)).fit(Keeping())\n")
    assert outcome.code == 0
    assert outcome.notes("state-0") == outcome.notes("state-1") == ["1"]
    assert "the states of 1 of a Own, for 2 ranks now" in outcome.output()


OFFICIAL = """
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    class Stateful(Model):
        def training_step(self, batch, batch_idx):
            note(f"seen-{RANK}", ",".join(str(int(index)) for index in batch[1]))
            return self.layer(batch[0]).square().mean()
        def train_dataloader(self):
            data = TensorDataset(torch.arange(96).reshape(24, 4) / 96, torch.arange(24))
            sampler = StatefulDistributedSampler(data, WORLD, RANK, seed=3) if OWN_SAMPLER else None
            options = {"num_workers": WORKERS, "sampler": sampler, "shuffle": sampler is None}
            return StatefulDataLoader(data, batch_size=2, **options)

    WORLD = int(os.environ["WORLD_SIZE"])
    pl.seed_everything(7)
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("own_sampler", [False, True])
def test_torchdatas_loader_goes_on_where_it_was_on_every_rank(
    elastic: Elastic, workers: int, own_sampler: bool
) -> None:
    setting = f"    WORKERS, OWN_SAMPLER = {workers}, {own_sampler}\n"
    options = "use_distributed_sampler=False" if own_sampler else ""

    def seen(mishap: str) -> list[list[str]]:
        body = f"{setting}{OFFICIAL}    trainer({mishap}{options}).fit(Stateful())\n"
        outcome = elastic(body, "--checkpoint-steps", "1", "--fresh")
        assert outcome.code == 0, outcome.output()
        notes = [outcome.run.parent / f"seen-{rank}.notes" for rank in (0, 1)]
        found = [path.read_text().split() for path in notes]
        for path in notes:
            path.unlink()
        return found

    calm = seen("")
    first = [sorted(index for batch in batches[:6] for index in batch.split(",")) for batches in calm]
    assert sorted(first[0] + first[1]) == sorted(str(number) for number in range(24))
    # Both die before the step is saved, and do it again.
    assert seen("At(4, die), ") == [batches[:4] + batches[3:] for batches in calm]
    assert seen("At(9, die), ") == [batches[:9] + batches[8:] for batches in calm]


def test_torchdatas_loader_is_taken_up_by_another_number_of_ranks_from_the_first_state_and_that_is_said(
    elastic: Elastic,
) -> None:
    body = "    WORKERS, OWN_SAMPLER = 0, False\n" + OFFICIAL
    flags = ("--checkpoint-steps", "1", "--max-restarts", "0")
    assert elastic(body + "    trainer(At(4, die)).fit(Stateful())\n", *flags).code == 1
    last = elastic(body + "    trainer().fit(Stateful())\n", *flags, workers=1)
    assert last.code == 0, last.output()
    assert "the states of 2 of a StatefulDataLoader, for 1 ranks now" in last.output()
