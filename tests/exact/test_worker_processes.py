"""Real DataLoader worker processes on two ranks that are killed, where nothing comes out even: the same batches."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.launching import Elastic

SIZE = 23

SCRIPT = f"""
class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return {SIZE}

    def __getitem__(self, index):
        return index, torch.rand(4) + index


class Seen(Model):
    def training_step(self, batch, batch_idx):
        pairs = zip(batch[0].tolist(), batch[1][:, 0].tolist())
        samples = ";".join(f"{{index}},{{drawn:.9f}}" for index, drawn in pairs)
        note("batches", f"{{self.current_epoch}}:{{batch_idx}}:{{RANK}}:{{samples}}")
        return self.layer(batch[1] / {SIZE}).square().mean()

    def train_dataloader(self):
        return DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=2, **OPTIONS)

    def on_train_end(self):
        note("weights", repr(self.layer.weight.tolist()).replace(" ", ""))


pl.seed_everything(7)
"""


def run(elastic: Elastic, options: str, mishaps: str, *flags: str) -> tuple[dict[str, str], list[str]]:
    """What each batch of each rank held, when it was done for the last time; and the parameters."""
    body = f"OPTIONS = {options}\n{SCRIPT}trainer({mishaps}).fit(Seen())\n"
    outcome = elastic(body, "--fresh", "--checkpoint-steps", "1", *flags)
    assert outcome.code == 0, outcome.output()
    batches = dict(line.rsplit(":", 1) for line in outcome.notes("batches"))
    (outcome.run.parent / "batches.notes").unlink()
    return batches, outcome.notes("weights")[-2:]


def samples_of(batches: dict[str, str], epoch: int) -> Counter[int]:
    return Counter(
        int(sample.split(",")[0])
        for when, samples in batches.items()
        if when.startswith(f"{epoch}:")
        for sample in samples.split(";")
    )


CASES = {
    "uneven": ("{}", ()),
    "drop_last": ("{'drop_last': True}", ()),
    "global batch": ("{'persistent_workers': True, 'prefetch_factor': 4}", ("--global-batch-size", "6")),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_ranks_get_the_same_batches_from_their_worker_processes(elastic: Elastic, name: str) -> None:
    options, flags = CASES[name]
    calm = run(elastic, options, "", *flags)
    assert run(elastic, options, "At(2, die)", *flags) == calm
    assert run(elastic, options, "At(6, die, rank=1)", *flags) == calm
    for epoch in (0, 1):
        seen = samples_of(calm[0], epoch)
        once = {"uneven": SIZE, "drop_last": 20, "global batch": SIZE}[name]
        assert len(seen) == once, "a round is four samples"
        assert sum(seen.values()) == once + (name == "uneven"), "a sample fills the last round up"
