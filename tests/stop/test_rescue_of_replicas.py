"""HSDP: ranks of a sharded job die, and those that hold the same shards in another replica group save the state."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.store import verify
from tests.launching import PRELUDE, Elastic, Outcome
from tests.stop.test_rescue import script

HSDP = """
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

VICTIMS = VICTIM if isinstance(VICTIM, tuple) else (VICTIM,)

def touch(name):
    (HERE / f"{name}.{RANK}").touch()

def wait_for(name, ranks=range(int(os.environ["WORLD_SIZE"]))):
    while not all((HERE / f"{name}.{rank}").exists() for rank in ranks):
        time.sleep(0.001)

class Replicated(Victim):
    '''Two groups of two ranks: 0 and 1, 2 and 3. Ranks 0 and 2 hold the same shard, and so do 1 and 3.

    Nobody dies before all others have what it gave to the last step that it took part in.
    '''
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    def configure_model(self):
        mesh = init_device_mesh("cpu", (self.trainer.world_size // 2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in (self.layer[0], self.layer[2], self.layer):
            fully_shard(layer, mesh=mesh)
    def on_after_backward(self):
        touch(f"gave-{ATTEMPT}-{self.global_step}")
        self.given = self.global_step
        super().on_after_backward()
    def is_due(self, point):
        if POINT != point or RANK not in VICTIMS or ATTEMPT or self.global_step != 5:
            return False
        wait_for(f"gave-0-{self.given}")
        touch("due")
        wait_for("due", VICTIMS)
        return True
    def configure_optimizers(self):
        model = self
        class Dying(torch.optim.Adam):
            def step(self, closure=None):
                loss = closure() if closure is not None else None
                if model.is_due("in the step"):
                    with torch.no_grad():
                        next(model.parameters()).to_local().add_(1000.0)
                    die()
                super().step()
                return loss
        return Dying(self.parameters(), lr=0.01)
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(256.0).reshape(64, 4) / 100), batch_size=2)

def hsdp():
    return ModelParallelStrategy(data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1)
Victim = Replicated

def once_all_gave(act):
    def wait_and_act():
        wait_for("gave-0-5")
        act()
    return wait_and_act
"""
FIT = "trainer(InACallback(), strategy=hsdp(), val_check_interval=5, max_epochs=1).fit(Victim())\n"

State = dict[str, Any]


def run(
    elastic: Elastic, point: str, victim: int | tuple[int, ...], *flags: str, more: str = "", workers: int = 4
) -> Outcome:
    return elastic(script(point, victim, HSDP + more) + FIT, "--keep", "9", *flags, workers=workers)


def state(run_dir: Path, step: int, folder: Path) -> State:
    """The parameters and the optimizer's state in the sharded checkpoint of a step, put together."""
    path = run_dir / "checkpoints" / "fit-1" / f"step={step}.ckpt"
    assert verify(path, deep=True).valid
    dcp_to_torch_save(path, folder / "whole.pt")
    whole = torch.load(folder / "whole.pt", weights_only=True)
    return {"parameters": whole["state_dict"], "optimizer": whole["optimizer_0"]["state"]}


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[int, State]:
    """The state after each step of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path, run_dir = folder / "train.py", folder / "run"
    path.write_text(PRELUDE + script("nowhere", 9, HSDP) + FIT)
    argv = ["--run-dir", str(run_dir), "--nproc-per-node", "4", "--checkpoint-steps", "1", "--keep", "9", str(path)]
    assert launch(parse(argv), Console(out=io.StringIO(), err=io.StringIO()), nursery) == 0
    return {step: state(run_dir, step, folder) for step in (5, 6, 8)}


@pytest.mark.parametrize(
    ("point", "victim", "step"), [("forward", 0, 5), ("backward", 1, 5), ("in the step", 2, 6), ("callback", 3, 5)]
)
def test_death_of_a_rank_costs_no_step_where_another_group_holds_its_shard(
    elastic: Elastic, undisturbed: dict[int, State], tmp_path: Path, point: str, victim: int, step: int
) -> None:
    outcome = run(elastic, point, victim)
    assert outcome.code == 0, outcome.said
    # A victim that has given its gradients lets the survivors complete the step that it dies in.
    assert [one["step"] for one in outcome.events("rescue")] == [step]
    assert outcome.events("no_rescue") == []
    assert outcome.events("steps_repeated")[0]["steps"] == 0
    assert outcome.events("resume")[-1]["step"] == step
    # Bit for bit: relative and absolute tolerance are 0.
    torch.testing.assert_close(state(outcome.run, step, tmp_path), undisturbed[step], rtol=0, atol=0)
    torch.testing.assert_close(state(outcome.run, 8, tmp_path), undisturbed[8], rtol=0, atol=0)
    assert not list((outcome.run / "checkpoints" / "fit-1").glob(".*"))


def test_survivors_of_different_groups_save_together_what_neither_group_has_whole(
    elastic: Elastic, undisturbed: dict[int, State], tmp_path: Path
) -> None:
    outcome = run(elastic, "forward", (0, 3))
    assert outcome.code == 0, outcome.said
    assert [(one["rank"], one["shard"]) for one in outcome.events("rescue_part")] in (
        [(1, 1), (2, 0)],
        [(2, 0), (1, 1)],
    )
    assert outcome.events("rescue")[0]["step"] == 5
    torch.testing.assert_close(state(outcome.run, 5, tmp_path), undisturbed[5], rtol=0, atol=0)
    torch.testing.assert_close(state(outcome.run, 8, tmp_path), undisturbed[8], rtol=0, atol=0)


@pytest.mark.parametrize(("point", "victims", "step"), [("forward", (0, 2), 5), ("in the step", (1, 3), 6)])
def test_a_shard_that_died_with_all_its_replicas_is_named_with_the_steps_that_it_takes_along(
    elastic: Elastic, point: str, victims: tuple[int, int], step: int
) -> None:
    outcome = run(elastic, point, victims, "--checkpoint-steps", "3")
    assert outcome.code == 0, outcome.said
    assert outcome.events("rescue") == []
    (told,) = outcome.events("no_rescue")
    assert (told["step"], told["safe_step"], told["lost"]) == (step, 3, step - 3)
    which = f"shard {victims[0]} (held by ranks {victims[0]} and {victims[1]})"
    assert told["why"] == f"of the 2 shards of step {step} nobody has left {which}"
    assert f"{step - 3} steps since step 3 are lost" in outcome.said
    assert outcome.events("resume")[-1]["step"] == 3
    assert not list((outcome.run / "checkpoints" / "fit-1").glob(".*"))


FALLS = "At(5, once_all_gave(fall_over), rank=1, hook='on_before_optimizer_step')"
DIES = "At(5, once_all_gave(die), rank=3, hook='on_before_optimizer_step')"


def run_without_validation(elastic: Elastic, callbacks: str, *flags: str, more: str = "") -> Outcome:
    fit = f"trainer({callbacks}, strategy=hsdp(), max_epochs=1, limit_val_batches=0{more}).fit(Victim())\n"
    return elastic(script("nowhere", 9, HSDP) + fit, *flags, workers=4)


def test_where_two_groups_are_a_step_apart_the_newer_state_wins_whoever_saves_first(elastic: Elastic) -> None:
    """Rank 1 falls before it takes step 6, and rank 0 waits for it; the other group takes that step."""
    outcome = run_without_validation(elastic, FALLS)
    assert outcome.code == 0, outcome.said
    assert {(6, 0), (6, 1)} <= {(one["step"], one["shard"]) for one in outcome.events("rescue_part")}
    assert max(one["step"] for one in outcome.events("rescue")) == 6
    assert outcome.events("resume")[-1]["step"] == 6
    assert outcome.events("no_rescue") == []
    assert outcome.events("steps_repeated")[0]["steps"] == 0


@pytest.mark.parametrize("clipping", ["", ", gradient_clip_val=1"])
def test_ranks_of_a_group_take_a_step_together_or_not_at_all(elastic: Elastic, clipping: str) -> None:
    """One of each group fails when all have their gradients: the others wait for it, with all of step 5 whole."""
    outcome = run_without_validation(elastic, f"{FALLS}, {DIES}", "--checkpoint-steps", "4", more=clipping)
    assert outcome.code == 0, outcome.said
    assert outcome.events("no_rescue") == []
    assert [one["step"] for one in outcome.events("rescue")] == [5]
    assert outcome.events("steps_repeated")[0]["steps"] == 0


def test_a_survivor_that_dies_over_its_shard_leaves_the_place_to_its_replica(elastic: Elastic) -> None:
    more = """
    from elastic_fit.supervisor.store.parts import Meeting
    def leave(self, staged, part, leave=Meeting.leave):
        if part.shard == 0 and not (HERE / "first").exists():
            (HERE / "first").touch()
            die()
        leave(self, staged, part)
    Meeting.leave = leave
    """
    outcome = run(elastic, "forward", 3, more=textwrap.dedent(more))
    assert outcome.code == 0, outcome.said
    assert (outcome.run.parent / "first").exists()
    assert [one["step"] for one in outcome.events("rescue")] == [5]
    assert len([one for one in outcome.events("worker_exit") if one["signal"] == "SIGKILL"]) == 2


def test_death_during_a_save_leaves_the_survivors_to_save_the_same_step(elastic: Elastic) -> None:
    more = """
    from elastic_fit.supervisor.store import Staged
    def commit(self, facts, entries, commit=Staged.commit_entries):
        if facts.step == 5 and ATTEMPT == 0 and RANK == 0:
            die()
        return commit(self, facts, entries)
    Staged.commit_entries = commit
    """
    outcome = run(elastic, "nowhere", 9, "--checkpoint-steps", "5", more=textwrap.dedent(more))
    assert outcome.code == 0, outcome.said
    assert [one["step"] for one in outcome.events("rescue")] == [5]
    assert outcome.events("steps_repeated")[0]["steps"] == 0
    assert not list((outcome.run / "checkpoints" / "fit-1").glob(".*"))


def test_a_shard_that_holds_nan_is_put_together_with_no_other(elastic: Elastic) -> None:
    more = """
    class Poisoned(Replicated):
        def at(self, point):
            if point == "callback" and ATTEMPT == 0 and self.global_step == 5 and RANK in (1, 3):
                for parameter in self.parameters():
                    parameter.detach().to_local().fill_(float("nan"))
            super().at(point)
    Victim = Poisoned
    """
    outcome = run(elastic, "callback", 0, "--checkpoint-steps", "3", more=textwrap.dedent(more))
    assert outcome.code == 0, outcome.said
    assert outcome.events("rescue") == []
    assert {one["rank"] for one in outcome.events("no_rescue") if "NaN or Inf" in one["why"]} == {1, 3}
    assert [(one["rank"], one["shard"]) for one in outcome.events("rescue_part")] == [(2, 0)]
    assert outcome.events("resume")[-1]["step"] == 3


def test_a_rescue_leaves_out_what_a_forward_pass_under_way_has_done_to_the_statistics(
    elastic: Elastic, tmp_path: Path
) -> None:
    more = """
    class Normalized(Replicated):
        def __init__(self):
            super().__init__()
            self.layer.insert(1, torch.nn.BatchNorm1d(8))
        def configure_model(self):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            fully_shard(self.layer, mesh=mesh)
    Victim = Normalized
    """
    outcome = run(elastic, "forward", 3, more=textwrap.dedent(more))
    assert outcome.code == 0, outcome.said
    assert outcome.events("rescue")[0]["step"] == 5
    assert state(outcome.run, 5, tmp_path)["parameters"]["layer.1.num_batches_tracked"] == 5


def test_a_survivor_that_dies_over_putting_the_shards_together_leaves_that_to_the_next(elastic: Elastic) -> None:
    """All have left their shards by then, and none has gone."""
    more = """
    from elastic_fit.callbacks import _sharded
    from elastic_fit.callbacks.replicas import Replicas
    def leave(self, *args, leave=Replicas._leave):
        leave(self, *args)
        touch("left")
        wait_for("left", (0, 1, 2))
    Replicas._leave = leave
    def merge(indexes, merge=_sharded.merge):
        if not (HERE / "first").exists():
            (HERE / "first").touch()
            die()
        return merge(indexes)
    _sharded.merge = merge
    """
    outcome = run(elastic, "forward", 3, "--checkpoint-steps", "3", more=textwrap.dedent(more))
    assert outcome.code == 0, outcome.said
    assert (outcome.run.parent / "first").exists()
    assert len([one for one in outcome.events("worker_exit") if one["signal"] == "SIGKILL"]) == 2
    assert [one["step"] for one in outcome.events("rescue")] == [5]
    assert sum(one["steps"] for one in outcome.events("steps_repeated")) == 0
    assert not list((outcome.run / "checkpoints" / "fit-1").glob(".*"))


def test_survivors_that_all_die_over_putting_the_shards_together_are_told_with_what_it_cost(elastic: Elastic) -> None:
    more = """
    from elastic_fit.callbacks import _sharded
    _sharded.merge = lambda indexes: die()
    """
    outcome = run(elastic, "forward", 3, "--checkpoint-steps", "3", more=textwrap.dedent(more))
    assert outcome.code == 0, outcome.said
    assert outcome.events("rescue") == []
    (told,) = outcome.events("no_rescue")
    assert "all 2 shards of step 5 were saved, and who was to put them together could not" in told["why"]
    assert (told["safe_step"], told["lost"]) == (3, 2)
    assert not list((outcome.run / "checkpoints" / "fit-1").glob(".*"))


def test_ranks_that_see_their_shards_differently_train_and_rescue_nothing(elastic: Elastic) -> None:
    more = """
    from elastic_fit.callbacks import _sharded
    if RANK == 1:
        _sharded.layouts = lambda module: []
    """
    outcome = run(elastic, "forward", 3, more=textwrap.dedent(more))
    assert outcome.code == 0, outcome.said
    assert outcome.events("rescue_part") == outcome.events("rescue") == []
    assert {one["why"] for one in outcome.events("no_rescue")} == {
        "with ModelParallelStrategy no rank holds the whole state"
    }


def test_survivors_whose_main_threads_never_come_back_are_rescued_by_others(elastic: Elastic) -> None:
    more = """
    import ctypes

    class Stuck(Replicated):
        def on_before_backward(self, loss):
            if self.global_step == 5 and ATTEMPT == 0 and RANK in (0, 2):
                mutex = ctypes.create_string_buffer(64)
                for _ in range(2):  # the second time it waits for itself: no signal and no closed connection ends that
                    ctypes.CDLL(None).pthread_mutex_lock(mutex)
            super().on_before_backward(loss)
    Victim = Stuck
    """
    outcome = run(elastic, "forward", 3, more=textwrap.dedent(more))
    assert outcome.code == 0, outcome.said
    assert outcome.events("teardown")[0]["seconds"] < 20  # the one whose shard was there already doesn't wait for 30 s
    assert [one["step"] for one in outcome.events("rescue")] == [5]
    assert sum(one["steps"] for one in outcome.events("steps_repeated")) == 0


def test_a_job_that_lost_half_its_ranks_goes_on_from_the_rescue_with_the_other_half(
    elastic: Elastic, tmp_path: Path
) -> None:
    assert run(elastic, "forward", 3, "--max-restarts", "0").code == 1
    outcome = run(elastic, "nowhere", 9, workers=2)
    assert outcome.code == 0, outcome.said
    assert outcome.events("resume")[-1]["step"] == 5
    # 40 of 64 samples are behind step 5; two ranks take four at a time.
    assert max(outcome.steps()) == 5 + (64 - 40) // 4
    assert verify(outcome.run / "checkpoints" / "fit-1" / "step=5.ckpt", deep=True).valid
