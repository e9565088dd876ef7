"""``--trace-steps`` and ``elastic-fit diff``: two runs are the same, or this is where they part."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from elastic_fit.launch.commands import diff
from elastic_fit.launch.render import Console
from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.rundir import RunDir
from tests.launching import Elastic


def compare(a: Path, b: Path, *flags: str) -> tuple[int, str]:
    out = io.StringIO()
    return diff.main([str(a), str(b), *flags], Console(out=out, err=io.StringIO())), out.getvalue()


BODY = """
class Noisy(Model):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + torch.rand(()))

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(32, 4, generator=generator)), batch_size=2, shuffle=True)

pl.seed_everything(SEED)
trainer(*MISHAPS).fit(Noisy())
"""


def noisy(mishaps: str, seed: int = 7) -> str:
    return BODY.replace("SEED", str(seed)).replace("MISHAPS", mishaps)


def traced(elastic: Elastic, name: str, body: str) -> Path:
    outcome = elastic(body, "--trace-steps", "--checkpoint-steps", "2")
    assert outcome.code == 0, outcome.output()
    kept = outcome.run.with_name(name)
    shutil.move(outcome.run, kept)
    return kept


def test_a_run_that_was_killed_is_step_for_step_the_one_that_was_not(elastic: Elastic) -> None:
    calm = traced(elastic, "calm", noisy("[]"))
    killed = traced(elastic, "killed", noisy("[At(7, die)]"))
    code, text = compare(calm, killed)
    assert (code, text) == (0, "the same: 16 steps, with the same samples and parameters after each\n")

    other = traced(elastic, "other", noisy("[]", seed=8))
    code, text = compare(calm, other, "--json")
    assert code == 1
    assert json.loads(text)["difference"] == {"fit": 1, "step": 1, "what": ["samples", "parameters"]}
    assert "they part at step 1:" in compare(calm, other)[1]


SHARDED = """
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard


class Sharded(Model):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def configure_model(self):
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


class Flip(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        if RANK == 1 and trainer.global_step in AT:
            module.layer.weight.data.to_local().neg_()


pl.seed_everything(7)
trainer(Flip(), strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)).fit(Sharded())
"""


def test_a_shard_that_differs_on_another_rank_after_the_last_step_is_a_difference(elastic: Elastic) -> None:
    calm = traced(elastic, "calm", SHARDED.replace("AT", "()"))
    same = traced(elastic, "same", SHARDED.replace("AT", "()"))
    assert compare(calm, same)[0] == 0
    flipped = traced(elastic, "flipped", SHARDED.replace("AT", "(16,)"))
    code, text = compare(calm, flipped)
    assert code == 1
    assert text.startswith("they part at step 16:\n  the parameters after the step: rank 1: ")
    assert "rank 0" not in text


def test_a_run_without_a_trace_is_a_mistake_that_is_named(tmp_path: Path) -> None:
    RunDir(tmp_path).create(command=[])
    with pytest.raises(UsageError, match="has no trace") as mistake:
        compare(tmp_path, tmp_path)
    assert "--trace-steps" in mistake.value.hint
