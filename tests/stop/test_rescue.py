"""A rank dies at one exact point: a survivor saves the state after the last step that was whole, bit for bit."""

from __future__ import annotations

import io
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.store import verify
from tests.launching import PRELUDE, Elastic, Outcome

SCRIPT = """
import sys
pl.seed_everything(7)

class Victim(Model):
    '''Dies, on one rank, at a point of step 6 (or in the validation after step 5).'''
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.at("forward")
        return loss
    def on_before_backward(self, loss):
        if self.is_due("backward"):
            loss.register_hook(lambda gradient: die())
    def on_after_backward(self):
        self.at("after the all-reduce")
    def on_before_optimizer_step(self, optimizer):
        self.at("before the step")
    def configure_optimizers(self):
        model = self
        class Mean(torch.optim.SGD):
            def step(self, closure=None):
                with torch.enable_grad():
                    loss = closure()
                if model.is_due("in the step"):
                    with torch.no_grad():
                        next(model.parameters()).add_(1000.0)
                    die()
                super().step()
                return loss
        return Mean(self.parameters(), lr=0.01, momentum=0.9)
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(128.0).reshape(32, 4) / 100), batch_size=2)
    def validation_step(self, batch, batch_idx):
        self.log("loss", self.layer(batch[0]).square().mean(), sync_dist=True)
        if not self.trainer.sanity_checking:
            self.at("validation")
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(12, 4)), batch_size=2)
    def is_due(self, point):
        return POINT == point and RANK == VICTIM and ATTEMPT == 0 and self.global_step == 5
    def at(self, point):
        if self.is_due(point):
            die()

class InACallback(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.at("callback")
"""


def run(
    elastic: Elastic,
    point: str,
    victim: int,
    *flags: str,
    more: str = "",
    workers: int = 2,
    callback: str = "InACallback()",
) -> Outcome:
    interval = 5 if point == "validation" else 1.0
    fit = f"trainer({callback}, val_check_interval={interval}, max_epochs=1).fit(Victim())\n"
    return elastic(script(point, victim, more) + fit, *flags, workers=workers)


def script(point: str, victim: int | tuple[int, ...], more: str = "") -> str:
    return f"POINT, VICTIM = {point!r}, {victim}\n{SCRIPT}{textwrap.dedent(more)}\n"


State = dict[str, Any]


def state(run_dir: Path, step: int) -> State:
    """The parameters and the optimizer's buffers in the checkpoint of a step."""
    checkpoint = torch.load(run_dir / "checkpoints" / "fit-1" / f"step={step}.ckpt", weights_only=True)
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states")}


def undisturbed_run(nursery: Nursery, folder: Path, more: str = "") -> Path:
    """The folder of a run that nobody disturbs, with a checkpoint of every step."""
    path, run_dir = folder / "train.py", folder / "run"
    path.write_text(PRELUDE + script("nowhere", 9, more) + "trainer(max_epochs=1).fit(Victim())\n")
    argv = ["--run-dir", str(run_dir), "--nproc-per-node", "2", "--checkpoint-steps", "1", "--keep", "9", str(path)]
    assert launch(parse(argv), Console(out=io.StringIO(), err=io.StringIO()), nursery) == 0
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[int, State]:
    """The state after each step of another run, which nobody disturbs."""
    run_dir = undisturbed_run(nursery, tmp_path_factory.mktemp("undisturbed"))
    return {step: state(run_dir, step) for step in (5, 6)}


POINTS = ["forward", "backward", "after the all-reduce", "before the step", "in the step", "callback", "validation"]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("point", POINTS)
def test_death_at_any_point_of_a_step_costs_none_that_was_whole(
    elastic: Elastic, undisturbed: dict[int, State], point: str, victim: int
) -> None:
    outcome = run(elastic, point, victim, "--keep", "9")
    assert outcome.code == 0, outcome.said
    (rescue,) = outcome.events("rescue")
    # A victim that has given its gradients lets the survivor complete step 6.
    gave = point in ("after the all-reduce", "before the step", "in the step")
    assert rescue["step"] in ((5, 6) if gave else (5,))
    assert rescue["rank"] == 1 - victim
    assert outcome.events("steps_repeated")[0]["steps"] == 0
    assert outcome.events("resume")[-1]["step"] == rescue["step"]
    # Bit for bit: relative and absolute tolerance are 0.
    torch.testing.assert_close(state(outcome.run, rescue["step"]), undisturbed[rescue["step"]], rtol=0, atol=0)


NORMALIZED = """
class Normalized(Victim):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))
    def training_step(self, batch, batch_idx):
        self.seen = self.seen + 1
        loss = self.layer(self.norm(batch[0])).square().mean()
        self.meet()
        self.at("forward")
        return loss
    def meet(self):
        '''Nobody dies before the other one has begun the step as well.'''
        if POINT != "nowhere" and ATTEMPT == 0 and self.global_step == 5:
            (HERE / f"there.{RANK}").touch()
            while not (HERE / f"there.{1 - RANK}").exists():
                time.sleep(0.001)
Victim = Normalized
"""


@pytest.fixture(scope="module")
def normalized(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> State:
    """The state after step 5 of a model with statistics of its batches, in a run that nobody disturbs."""
    return state(undisturbed_run(nursery, tmp_path_factory.mktemp("normalized"), NORMALIZED), 5)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("point", ["forward", "backward"])
def test_a_rescue_leaves_out_what_a_forward_pass_under_way_has_done_to_the_statistics(
    elastic: Elastic, normalized: State, point: str, victim: int
) -> None:
    outcome = run(elastic, point, victim, "--keep", "9", more=NORMALIZED)
    assert outcome.code == 0, outcome.said
    (rescue,) = outcome.events("rescue")
    assert (rescue["step"], rescue["rank"]) == (5, 1 - victim)
    assert normalized["state_dict"]["norm.num_batches_tracked"] == normalized["state_dict"]["seen"] == 5
    torch.testing.assert_close(state(outcome.run, 5), normalized, rtol=0, atol=0)


def test_a_stop_in_the_middle_of_an_accumulation_leaves_out_what_its_batches_have_done_to_the_statistics(
    elastic: Elastic,
) -> None:
    more = f"""
    class Slow(Victim):
        def training_step(self, batch, batch_idx):
            if batch_idx == 52 and RANK == 0:
                os.kill({os.getpid()}, signal.SIGTERM)
            time.sleep(0.04 if batch_idx >= 50 else 0)
            return super().training_step(batch, batch_idx)
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(400, 4)), batch_size=2)
    trainer(accumulate_grad_batches=50, max_epochs=1, limit_val_batches=0).fit(Slow())
    """
    outcome = elastic(script("nowhere", 9, NORMALIZED) + textwrap.dedent(more), "--grace", "1.2s")
    assert outcome.code == 75, outcome.said
    assert outcome.events("stop_decision")[0]["half_accumulated"] > 0
    saved = state(outcome.run, 1)["state_dict"]
    assert saved["norm.num_batches_tracked"] == saved["seen"] == 50


def test_death_during_a_save_leaves_the_survivor_to_save_the_same_step(elastic: Elastic) -> None:
    more = """
    from elastic_fit.supervisor.store import Staged
    def commit(self, facts, commit=Staged.commit, **rest):
        if facts.step == 5 and ATTEMPT == 0 and RANK == 0:
            die()
        return commit(self, facts, **rest)
    Staged.commit = commit
    """
    outcome = run(elastic, "nowhere", 9, "--checkpoint-steps", "5", more=more)
    assert outcome.code == 0
    (rescue,) = outcome.events("rescue")
    assert (rescue["step"], rescue["rank"]) == (5, 1)
    assert outcome.events("steps_repeated")[0]["steps"] == 0
    assert not list((outcome.run / "checkpoints" / "fit-1").glob(".*"))


def test_a_rescuer_that_dies_over_its_save_leaves_the_place_to_the_next(elastic: Elastic) -> None:
    more = """
    from elastic_fit.supervisor.store import Staged
    def commit(self, facts, commit=Staged.commit, **rest):
        if facts.kind == "emergency" and ATTEMPT == 0 and not (HERE / "first").exists():
            (HERE / "first").touch()
            die()
        return commit(self, facts, **rest)
    Staged.commit = commit
    """
    outcome = run(elastic, "forward", 2, more=more, workers=3)
    assert outcome.code == 0
    assert (outcome.run.parent / "first").exists()
    (rescue,) = outcome.events("rescue")
    assert rescue["step"] == 5


def test_where_survivors_are_a_step_apart_the_newer_state_wins_whoever_saves_first(elastic: Elastic) -> None:
    """Rank 1 falls before it takes step 6 and saves step 5 first; rank 0 has taken step 6 and saves that after it."""
    falls = "At(5, fall_over, rank=1, hook='on_before_optimizer_step')"
    outcome = run(elastic, "nowhere", 9, "--keep", "9", callback=falls)
    assert outcome.code == 0
    rescues = {rescue["rank"]: rescue for rescue in outcome.events("rescue")}
    assert rescues[1]["step"] == 5
    assert rescues[0]["step"] == 6
    assert rescues[0]["newer_than"] == 5
    assert outcome.events("resume")[-1]["step"] == 6


def test_a_survivor_whose_main_thread_never_comes_back_is_rescued_by_another_thread(elastic: Elastic) -> None:
    body = """
    import ctypes

    class Stuck(Model):
        def on_before_backward(self, loss):
            if self.global_step == 5 and ATTEMPT == 0:
                if RANK == 1:
                    die()
                mutex = ctypes.create_string_buffer(64)
                for _ in range(2):  # the second time it waits for itself: no signal and no closed connection ends that
                    ctypes.CDLL(None).pthread_mutex_lock(mutex)

    trainer().fit(Stuck())
    """
    outcome = elastic(body)
    assert outcome.code == 0, outcome.output()
    assert [(one["rank"], one["step"]) for one in outcome.events("rescue")] == [(0, 5)]
    assert sum(one["steps"] for one in outcome.events("steps_repeated")) == 0


def test_an_exception_on_all_ranks_at_once_is_rescued_once_and_counts_as_a_failure(elastic: Elastic) -> None:
    more = """
    class All(Victim):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5 and ATTEMPT == 0:
                fall_over()
            return super().training_step(batch, batch_idx)
    Victim = All
    """
    outcome = run(elastic, "nowhere", 9, more=more)
    assert outcome.code == 0
    assert [rescue["step"] for rescue in outcome.events("rescue")] == [5]
    assert outcome.events("decision")[0]["action"] == "restart"
    assert "the script's own mistake" in outcome.said


@pytest.mark.parametrize("workers", [1, 2])
def test_a_script_that_ends_itself_with_an_error_in_a_hook_costs_no_step(elastic: Elastic, workers: int) -> None:
    end = "lambda: sys.exit(3), rank=0, hook='on_train_batch_start'"
    outcome = elastic(f"import sys\ntrainer(At(5, {end})).fit(Model())\n", workers=workers)
    assert outcome.code == 0, outcome.said
    assert {one["step"] for one in outcome.events("rescue")} == {5}
    assert outcome.notes("trained") == [str(step) for step in range(1, 17 if workers == 2 else 33)]


def test_a_state_that_holds_nan_is_kept_by_a_survivor_and_not_gone_on_from(elastic: Elastic) -> None:
    more = """
    class Diverges(Victim):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if ATTEMPT == 0 and self.global_step == 5:
                raise ValueError("the loss is NaN")
            return loss * (float("nan") if ATTEMPT == 0 and self.global_step == 4 else 1.0)
    Victim = Diverges
    """
    outcome = run(elastic, "nowhere", 9, "--checkpoint-steps", "3", "--keep", "99", more=more)
    assert outcome.code == 0, outcome.said
    assert outcome.events("rescue") == []
    assert {(one["step"], one["safe_step"]) for one in outcome.events("no_rescue")} == {(5, 3)}
    assert all("NaN or Inf" in one["why"] for one in outcome.events("no_rescue"))
    assert outcome.events("resume")[-1]["step"] == 3
    verdict = verify(outcome.run / "checkpoints" / "fit-1" / "step=5.ckpt")
    assert not verdict.valid
    assert verdict.manifest is not None
    assert verdict.manifest.finite is False


def test_a_device_that_may_be_behind_its_process_is_not_rescued(elastic: Elastic) -> None:
    elsewhere = """
    from lightning.pytorch.strategies import DDPStrategy
    class Elsewhere(pl.Callback):
        def on_exception(self, *_):
            DDPStrategy.root_device = torch.device("cuda")
    trainer(At(5, die, rank=1), Elsewhere(), max_epochs=1).fit(Model())
    """
    outcome = elastic(elsewhere, "--checkpoint-steps", "3")
    assert outcome.code == 0, outcome.said
    assert outcome.events("rescue") == []
    (told,) = outcome.events("no_rescue")
    assert (told["safe_step"], told["lost"]) == (3, 2)
    assert "which step the state on cuda is of" in told["why"]


def test_an_exception_in_a_worker_alone_is_rescued_too(elastic: Elastic) -> None:
    outcome = elastic("trainer(At(5, fall_over), max_epochs=1).fit(Model())\n", workers=1)
    assert outcome.code == 0
    assert outcome.events("rescue")[0]["step"] == 5


def test_a_dead_rank_of_a_sharded_job_takes_its_shard_along_and_the_ledger_says_what_is_lost(elastic: Elastic) -> None:
    sharded = """
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    class Sharded(Model):
        def configure_model(self):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])
        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean()
    trainer(
        At(5, die, rank=1), max_epochs=1, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    ).fit(Sharded())
    """
    outcome = elastic(sharded, "--checkpoint-steps", "3")
    assert outcome.code == 0
    assert outcome.events("rescue") == []
    (told,) = outcome.events("no_rescue")
    assert (told["safe_step"], told["lost"]) == (3, 2)
    assert "no rank holds the whole state" in told["why"]


def test_a_worker_that_dies_while_the_run_stops_is_rescued_and_the_run_ends_as_saved(elastic: Elastic) -> None:
    more = f"""
    class Both(Victim):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5 and ATTEMPT == 0 and RANK == 1:
                os.kill({os.getpid()}, signal.SIGTERM)
                die()
            return super().training_step(batch, batch_idx)
    Victim = Both
    """
    outcome = run(elastic, "nowhere", 9, more=more)
    assert outcome.code == 75
    assert outcome.events("rescue")[0]["step"] == 5
    assert len(outcome.events("workers_started")) == 1


def test_a_worker_that_dies_while_the_run_stops_right_after_a_save_ends_the_run_as_saved(elastic: Elastic) -> None:
    body = f"""
    def stop_and_die():
        told(lambda: os.kill({os.getpid()}, signal.SIGTERM))()
        if RANK == 0:
            die()

    trainer(At(8, stop_and_die, hook="on_train_epoch_start")).fit(Model())
    """
    outcome = elastic(body)
    assert outcome.events("rescue") == []
    assert (outcome.steps(), outcome.code) == ([8], 75)


def test_what_an_earlier_fit_has_saved_is_no_save_of_the_one_that_is_stopped(elastic: Elastic) -> None:
    body = f"""
    def stop_and_die():
        told(lambda: os.kill({os.getpid()}, signal.SIGTERM))()
        die()
    trainer(max_epochs=2).fit(Model())
    trainer(At(5, stop_and_die), max_epochs=2).fit(Model())
    """
    outcome = elastic(body)
    assert outcome.code == 143, outcome.said
    assert not list((outcome.run / "checkpoints").glob("fit-2/*.ckpt"))


MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.mark.system
def test_a_worker_that_the_kernel_kills_for_its_memory_costs_no_step(elastic: Elastic, tmp_path: Path) -> None:
    group = MEMORY / f"elastic-fit-{tmp_path.name}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(600 << 20))
        more = f"""
        class Hungry(Victim):
            def training_step(self, batch, batch_idx):
                if self.global_step == 5 and ATTEMPT == 0 and RANK == 1:
                    Path({str(group / "cgroup.procs")!r}).write_text(str(os.getpid()))
                    hoard = [bytearray(os.urandom(1 << 20)) for _ in range(4000)]
                return super().training_step(batch, batch_idx)
        Victim = Hungry
        """
        outcome = run(elastic, "nowhere", 9, more=more)
        assert outcome.code == 0
        killed = [one for one in outcome.events("worker_exit") if one["signal"] == "SIGKILL"]
        assert [one["rank"] for one in killed] == [1]
        assert outcome.events("rescue")[0]["step"] == 5
        assert "out-of-memory" in outcome.said
    finally:
        group.rmdir()
