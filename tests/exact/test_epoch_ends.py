"""A rank dies after an epoch's last step: its validation, its end and its row come once, whoever saved, wherever."""

from __future__ import annotations

import io
import itertools
import os
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.exact.mishaps import MOMENTS, Mishap, run_to_the_end
from tests.exact.test_bitwise import clear, differing_bits
from tests.launching import Elastic, Outcome

BODY = """
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR


class Net(Model):
    '''What it logs is the same on every rank.'''

    def __init__(self):
        super().__init__()
        self.register_buffer("ends", torch.zeros(2))

    def training_step(self, batch, batch_idx):
        self.log("norm", self.layer.weight.norm(), on_step=True, on_epoch=True)
        self.log("shared", self.layer.weight.norm(), on_step=False, on_epoch=True, sync_dist=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).square().mean(), sync_dist=True)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.ends[0] += 1

    def on_train_epoch_end(self):
        self.ends[1] += 1
        self.log("ends", self.ends.sum())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        plateau = ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=10.0)
        return [optimizer], [StepLR(optimizer, 1, 0.9), {"scheduler": plateau, "monitor": MONITOR}]

    def train_dataloader(self):
        data = torch.randn(4 * BATCHES, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(data), batch_size=2, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.linspace(-1, 1, 32).reshape(8, 4)), batch_size=2)

    def on_train_end(self):
        trainer = self.trainer
        state = {
            "parameters": self.state_dict(),
            "optimizers": [one.state_dict() for one in trainer.optimizers],
            "schedulers": [one.scheduler.state_dict() for one in trainer.lr_scheduler_configs],
            "hooks": HOOKS.state_dict(),
            "stopping": STOPPING.state_dict(),
            "best": [float(one) for one in sorted(BEST.best_k_models.values())],
            "epoch": [trainer.current_epoch, trainer.global_step],
        }
        torch.save(torch.utils._pytree.tree_map(local, state), HERE / f"end-{RANK}.pt")


def local(thing):
    return thing.to_local() if hasattr(thing, "to_local") else thing


class Hooks(pl.Callback):
    '''Counts what is called at the end of a validation or an epoch.'''

    def __init__(self):
        self.counts = {}

    def on_validation_start(self, trainer, module):
        self.count(trainer, "on_validation_start")

    def on_validation_end(self, trainer, module):
        self.count(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer, module):
        self.count(trainer, "on_train_epoch_end")

    def on_train_epoch_start(self, trainer, module):
        self.count(trainer, "on_train_epoch_start")

    def count(self, trainer, hook):
        if not trainer.sanity_checking:
            self.counts[hook] = self.counts.get(hook, 0) + 1

    def state_dict(self):
        return dict(self.counts)

    def load_state_dict(self, state):
        self.counts = dict(state)


class Strike(pl.Callback):
    '''One rank dies, or raises, within a hook, and the other stands there until it notices.'''

    def __init__(self, hook, step, rank=0, act=None, nth=1):
        self.step, self.rank, self.act, self.nth = step, rank, act, nth
        setattr(self, hook, self.look)

    def look(self, trainer, *_):
        if ATTEMPT > 0 or trainer.global_step != self.step or trainer.sanity_checking:
            return
        self.nth -= 1
        if self.nth == 0:
            self.act_once()

    def act_once(self):
        if self.rank == RANK:
            self.act()
        torch.distributed.barrier()


class Stop(Strike):
    '''The job is asked to stop.'''

    def act_once(self):
        mark = HERE / f"stopped-{RANK}"
        if not mark.exists():
            mark.touch()
            told(lambda: os.kill(LAUNCHER, signal.SIGTERM))()


HOOKS = Hooks()


def run(*strikes, late=(), monitor="val_loss", patience=100, batches=3, **options):
    global MONITOR, STOPPING, BEST, BATCHES
    BATCHES, MONITOR, STOPPING = batches, monitor, EarlyStopping(monitor, patience=patience)
    BEST = ModelCheckpoint(HERE / "best", monitor=monitor, save_top_k=2)
    pl.seed_everything(7)
    logger = CSVLogger(HERE, name="csv")
    options = {"max_epochs": 3, "log_every_n_steps": 1, "enable_checkpointing": True, **options}
    trainer(HOOKS, STOPPING, *strikes, BEST, *late, logger=logger, **options).fit(Net())


"""


@dataclass(frozen=True, slots=True)
class End:
    """What a run leaves: every rank's state, the log, how often it failed, and which steps survivors have saved."""

    states: list[dict[str, Any]]
    log: str
    failed: int
    rescued: list[int]


def run(elastic: Elastic, call: str, *, stops: int = 0, workers: int = 2) -> End:
    script, flags = f"LAUNCHER = {os.getpid()}\n{BODY}", ("--checkpoint-steps", "100")
    for _ in range(stops):
        stopped = elastic(script + call, *flags, workers=workers)
        assert stopped.code == 75, stopped.said
    outcome = elastic(script + call, *flags, workers=workers)
    assert outcome.code == 0, outcome.said + outcome.output()[-4000:]
    return end_of(outcome)


def end_of(outcome: Outcome) -> End:
    folder = outcome.run.parent
    states = [torch.load(io.BytesIO((folder / f"end-{rank}.pt").read_bytes())) for rank in range(2)]
    log = (folder / "csv" / "version_0" / "metrics.csv").read_text()
    failed = len(outcome.events("decision"))
    end = End(states, log, failed, [event["step"] for event in outcome.events("rescue")])
    clear(folder)
    return end


def assert_same(end: End, calm: End) -> None:
    assert end.log == calm.log
    assert differing_bits(end.states, calm.states) == 0


BATCH_ENDS = ("on_train_batch_end",)
VALIDATION = ("on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end")
EPOCH_ENDS = ("on_train_epoch_end",)
NEXT_ONE = ("on_train_epoch_start", "on_train_batch_start")
KINDS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "an epoch that ends with a validation": ("", 3, BATCH_ENDS + VALIDATION + EPOCH_ENDS + NEXT_ONE),
    "an epoch without one": (
        "check_val_every_n_epoch=2, monitor='norm_epoch'",
        3,
        BATCH_ENDS + EPOCH_ENDS + NEXT_ONE,
    ),
    "a validation within the epoch": ("val_check_interval=2", 2, BATCH_ENDS + VALIDATION + NEXT_ONE[1:]),
    "the last epoch": ("", 9, BATCH_ENDS + VALIDATION + EPOCH_ENDS + ("on_train_end",)),
    "an epoch that max_steps cut short": (
        "max_epochs=-1, max_steps=8",
        8,
        BATCH_ENDS + EPOCH_ENDS + ("on_train_end",),
    ),
    "an epoch after which the training stops early": (
        "patience=1, max_epochs=6",
        6,
        BATCH_ENDS + VALIDATION[-1:] + EPOCH_ENDS + ("on_train_end",),
    ),
    "an epoch after which min_steps put off the early stop": (
        "patience=1, max_epochs=6, min_steps=8",
        8,
        BATCH_ENDS,
    ),
    "an epoch that an early stop cuts short": (
        "patience=1, max_epochs=6, batches=5, val_check_interval=2",
        4,
        VALIDATION + EPOCH_ENDS + ("on_train_end",),
    ),
    "one before, where max_steps are set": (
        "max_epochs=-1, max_steps=8",
        3,
        EPOCH_ENDS + NEXT_ONE,
    ),
    "accumulation, and a validation after each batch": (
        "accumulate_grad_batches=2, val_check_interval=1",
        2,
        BATCH_ENDS + VALIDATION[2:] + EPOCH_ENDS,
    ),
}
"""Options, the step after which a rank fails, and the hooks in which it does."""
WAYS = (("die", 1), ("die", 0), ("fall_over", 1), ("fall_over", 0))


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_follows_a_step_is_done_once_wherever_a_rank_fails(kind: str, elastic: Elastic) -> None:
    options, step, moments = KINDS[kind]
    calm = run(elastic, f"run({options})\n")
    for moment, (act, rank) in zip(moments, itertools.cycle(WAYS), strict=False):
        end = run(elastic, f"run(Strike({moment!r}, {step}, {rank}, {act}), {options})\n")
        print(f"{act} of rank {rank} in {moment}")
        assert_same(end, calm)
        assert end.failed == 1
        # Otherwise the epoch's end had been saved by all of them.
        assert end.rescued[:1] == [step] or moment in (*NEXT_ONE, "on_train_end")


def test_so_it_is_within_a_validation_in_the_middle_of_an_accumulation(elastic: Elastic) -> None:
    options = "batches=5, accumulate_grad_batches=2, val_check_interval=1"
    calm = run(elastic, f"run({options})\n")
    end = run(elastic, f"run(Strike('on_validation_start', 1, 1, die, nth=2), {options})\n")
    assert end.rescued == [1]
    assert_same(end, calm)


def test_a_rescue_while_averaged_weights_are_in_the_model_keeps_them_and_its_own_apart(elastic: Elastic) -> None:
    """After a validation's last batch too, where a survivor waits for the dead rank's share of the metrics."""
    averaged = "from lightning.pytorch.callbacks import EMAWeightAveraging\nlate = [EMAWeightAveraging(decay=0.7)]\n"
    calm = run(elastic, averaged + "run(late=late)\n")
    for hook in ("on_validation_batch_end", "on_validation_epoch_end"):
        end = run(elastic, averaged + f"run(Strike({hook!r}, 3, 1, die), late=late)\n")
        assert end.rescued == [3]
        assert_same(end, calm)


FULL = """
import errno
from elastic_fit.supervisor.store import SaveFailed, Staged


def commit(self, facts, commit=Staged.commit, **rest):
    if facts.kind == "epoch":
        raise SaveFailed(self.target, OSError(errno.ENOSPC, "no space"))
    return commit(self, facts, **rest)


Staged.commit = commit
"""


def test_so_it_is_where_nobody_could_save_the_epochs_end(elastic: Elastic) -> None:
    calm = run(elastic, "run()\n")
    for moment, step in (*((one, 3) for one in NEXT_ONE), ("on_train_end", 9)):
        end = run(elastic, FULL + f"run(Strike({moment!r}, {step}, 1, die))\n")
        assert end.rescued == [step]
        assert_same(end, calm)


HSDP = """
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Sharded(Net):
    def configure_model(self):
        fully_shard(self.layer, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))

    def training_step(self, batch, batch_idx):
        self.log("norm", float(self.global_step), on_step=True, on_epoch=True)
        return Model.training_step(self, batch, batch_idx)


Net = Sharded
options = {"batches": 6, "strategy": ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1)}
"""


def test_so_it_is_where_survivors_save_their_shards(elastic: Elastic) -> None:
    calm = run(elastic, HSDP + "run(**options)\n", workers=4)
    for moment in ("on_validation_end", "on_train_epoch_end"):
        end = run(elastic, HSDP + f"run(Strike({moment!r}, 3, 1, die), **options)\n", workers=4)
        assert end.rescued[-1] == 3
        assert_same(end, calm)


def test_a_state_whose_schedulers_are_half_stepped_is_not_rescued(elastic: Elastic) -> None:
    falls = """
class Falls(Net):
    def lr_scheduler_step(self, scheduler, metric):
        super().lr_scheduler_step(scheduler, metric)
        if ATTEMPT == 0 and self.global_step == 6 and metric is None:
            fall_over()

Net = Falls
run()
"""
    end = run(elastic, falls)
    assert end.rescued == []
    assert_same(end, run(elastic, "run()\n"))


@pytest.mark.parametrize(
    ("options", "step", "moments"),
    [
        ("", 3, (*BATCH_ENDS, *VALIDATION[:3])),
        ("batches=5, accumulate_grad_batches=2, val_check_interval=1", 1, VALIDATION[:2]),
        ("max_epochs=-1, max_steps=9", 9, VALIDATION[:2]),
    ],
    ids=["at an epoch's end", "in the middle of an accumulation", "after the last step"],
)
def test_so_it_is_when_the_job_is_stopped_there(
    options: str, step: int, moments: tuple[str, ...], elastic: Elastic
) -> None:
    calm = run(elastic, f"run({options})\n")
    nth = 2 if "accumulate" in options else 1
    for moment in moments:
        print(moment)
        assert_same(run(elastic, f"run(Stop({moment!r}, {step}, nth={nth}), {options})\n", stops=1), calm)


ANYWHERE = (*MOMENTS, *BATCH_ENDS, *VALIDATION, "on_validation_batch_start", *EPOCH_ENDS, *NEXT_ONE)


def drawn(seed: int, count: int, every: int) -> list[Mishap]:
    """Failures and stops in any hook, one in so many steps."""
    source = random.Random(seed)
    return [
        Mishap(
            step=every * number + source.randint(1, every - 1),
            moment=source.choice(ANYWHERE),
            act=source.choice(("die", "die", "die", "fall_over", "stop")),
            rank=source.randrange(2),
        )
        for number in range(count)
    ]


def test_ten_failures_and_stops_anywhere_in_epochs_of_three_batches_leave_no_trace(elastic: Elastic) -> None:
    calm = run(elastic, "run(max_epochs=16)\n")
    mishaps = drawn(1, 10, 4)
    outcome, restarts = run_to_the_end(
        elastic, BODY + "run(*MISHAPS, max_epochs=16)\n", mishaps, "--checkpoint-steps", "100"
    )
    assert restarts == 10
    assert_same(end_of(outcome), calm)


def test_a_validation_in_the_midst_of_an_accumulation_is_done_once_also_if_a_rank_dies_after_it(
    elastic: Elastic,
) -> None:
    options = "batches=5, accumulate_grad_batches=2, val_check_interval=1"
    calm = run(elastic, f"run({options})\n")
    end = run(elastic, f"run(Strike('on_train_batch_start', 1, 1, die, nth=2), {options})\n")
    assert_same(end, calm)
    assert end.rescued == [1]


SHARDED = """
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

class Sharded(Net):
    def configure_model(self):
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def on_train_epoch_end(self):
        pass

    def on_train_end(self):
        note("ended", self.trainer.global_step)

Net = Sharded
"""


def test_a_stop_before_a_validation_is_saved_where_one_rank_gathers_the_optimizers_state(elastic: Elastic) -> None:
    gathered = "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)"
    script = f"LAUNCHER = {os.getpid()}\n{BODY}{SHARDED}run(Stop('on_train_batch_end', 3), strategy={gathered})\n"
    stopped = elastic(script, "--checkpoint-steps", "100")
    assert stopped.code == 75, stopped.said + stopped.output()[-4000:]
    assert [event["step"] for event in stopped.events("save")] == [3]
    again = elastic(script, "--checkpoint-steps", "100")
    assert again.code == 0, again.said
    assert set(again.notes("ended")) == {"9"}


def test_an_early_stop_ends_the_fit_that_it_is_of_and_no_later_one(elastic: Elastic) -> None:
    script = """
    from lightning.pytorch.callbacks import EarlyStopping

    class Flat(Model):
        def validation_step(self, batch, batch_idx):
            self.log("flat", 1.0)
        def val_dataloader(self):
            return self.train_dataloader()

    stopping = EarlyStopping("flat", patience=1)
    first = trainer(stopping, max_epochs=10)
    first.fit(Flat())
    first.fit_loop.max_epochs = 20
    first.fit(Flat())
    trainer(stopping, max_epochs=10).fit(Flat())
    """
    outcome = elastic(script, workers=1)
    assert outcome.code == 0, outcome.said
    assert [bool(outcome.steps(number)) for number in (1, 2, 3)] == [True, True, True]


def test_a_callback_whose_state_cant_be_copied_is_told_of_and_does_no_harm(elastic: Elastic) -> None:
    script = """
    class Odd:
        def __deepcopy__(self, memo):
            raise TypeError("this can't be copied")

    class Holds(pl.Callback):
        def state_dict(self):
            return {"odd": Odd()}

    class Validated(Model):
        def validation_step(self, batch, batch_idx):
            pass
        def val_dataloader(self):
            return self.train_dataloader()

    trainer(Holds(), max_epochs=1).fit(Validated())
    """
    outcome = elastic(script, "--load-unsafe", workers=1)
    assert outcome.code == 0, outcome.said
    assert "can't be copied (TypeError: this can't be copied)" in outcome.output()
