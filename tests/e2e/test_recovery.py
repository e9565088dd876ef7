"""A run loses workers, and goes on as the run that it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launching import Elastic

EVERY_STEP_ONCE = [str(step) for step in range(1, 17)]


def test_a_script_that_hard_codes_one_device_runs_on_all_workers(elastic: Elastic) -> None:
    outcome = elastic("trainer(devices=1, num_nodes=1).fit(Model())\n")
    assert outcome.code == 0
    assert outcome.notes("trained") == EVERY_STEP_ONCE
    assert outcome.events("save")[-1]["kind"] == "final"
    assert "resume   none: starting at step 0" in outcome.said
    assert "16 steps, 0 restarts, 0 steps repeated" in outcome.said


def test_a_killed_worker_costs_no_step(elastic: Elastic) -> None:
    outcome = elastic("trainer(At(5, die, rank=1)).fit(Model())\n")
    assert outcome.code == 0
    assert outcome.events("rescue")[0]["step"] == 5
    assert outcome.notes("trained") == EVERY_STEP_ONCE
    assert "rank 1" in outcome.said
    assert "killed by SIGKILL" in outcome.said
    assert "lost     0 optimizer steps" in outcome.said
    assert outcome.events("recovered")[0]["total_s"] > 0


def test_a_worker_that_is_stopped_and_not_continued_costs_no_step(elastic: Elastic) -> None:
    freeze = "import os, signal\ndef freeze():\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
    outcome = elastic(freeze + "trainer(At(5, freeze, rank=1)).fit(Model())\n")
    assert outcome.code == 0
    assert "is stopped (SIGSTOP), and the others wait for it: killing it" in outcome.said
    assert outcome.events("frozen")[0]["rank"] == 1
    assert outcome.events("rescue")[0]["step"] == 5
    assert outcome.notes("trained") == EVERY_STEP_ONCE


def test_fresh_interpreters_recover_as_well(elastic: Elastic) -> None:
    outcome = elastic("trainer(At(5, die, rank=1), max_epochs=1).fit(Model())\n", "--no-warm")
    assert outcome.code == 0
    assert outcome.notes("trained") == EVERY_STEP_ONCE[:8]


def test_all_workers_killed_at_once_go_on_from_the_last_checkpoint(elastic: Elastic) -> None:
    outcome = elastic("trainer(At(7, die)).fit(Model())\n", "--checkpoint-steps", "3")
    assert outcome.code == 0
    assert outcome.events("resume")[-1]["step"] == 6
    assert outcome.events("steps_repeated")[0]["steps"] <= 1
    assert outcome.notes("trained")[-10:] == EVERY_STEP_ONCE[6:]


def test_death_inside_the_backward_pass_costs_no_step(elastic: Elastic) -> None:
    outcome = elastic("trainer(At(5, die, rank=0, hook='on_before_backward')).fit(Model())\n")
    assert outcome.code == 0
    assert outcome.events("rescue")[0]["step"] == 5
    assert [note for note in outcome.notes("trained") if int(note) > 5] == EVERY_STEP_ONCE[5:]


def test_an_exception_on_one_rank_is_rescued_and_told_with_its_traceback(elastic: Elastic) -> None:
    outcome = elastic("trainer(At(5, fall_over, rank=1)).fit(Model())\n")
    assert outcome.code == 0
    assert "RuntimeError: the script's own mistake" in outcome.said
    assert "decision restart" in outcome.said
    assert outcome.events("rescue")[0]["step"] == 5


def test_a_mistake_before_the_first_step_ends_at_once_with_the_traceback(elastic: Elastic) -> None:
    outcome = elastic("import a_module_that_nobody_has\n")
    assert outcome.code == 1
    assert "ModuleNotFoundError" in outcome.said
    assert len(outcome.events("workers_started")) == 1


def test_a_failure_that_comes_back_at_the_same_step_ends_the_run_with_its_cause(elastic: Elastic) -> None:
    outcome = elastic(
        """
        class Cursed(Model):
            def training_step(self, batch, batch_idx):
                if self.global_step == 4:
                    fall_over()
                return super().training_step(batch, batch_idx)
        trainer().fit(Cursed())
        """,
        "--max-restarts",
        "9",
    )
    assert outcome.code == 1
    assert len(outcome.events("workers_started")) == 3
    assert "RuntimeError: the script's own mistake" in outcome.said


def test_a_run_that_had_finished_is_restored_and_not_trained_again(elastic: Elastic) -> None:
    body = "t = trainer(); m = Model(); t.fit(m); t.test(m)\n"
    assert elastic(body).code == 0
    again = elastic(body)
    assert again.code == 0
    assert again.notes("trained") == EVERY_STEP_ONCE
    assert set(again.notes("tested")) == {"16"}
    assert "step 16 (finished)" in again.said


def test_a_stopped_run_says_75_and_the_same_command_goes_on(elastic: Elastic) -> None:
    stop = f"lambda: os.kill({os.getpid()}, signal.SIGTERM)"
    first = elastic(f"trainer(At(5, told({stop}))).fit(Model())\n")
    assert first.code == 75
    assert "SIGTERM: saving and stopping" in first.said
    second = elastic("trainer().fit(Model())\n")
    assert second.code == 0
    assert second.notes("trained") == EVERY_STEP_ONCE


def test_a_script_without_lightning_is_restarted_all_the_same(elastic: Elastic) -> None:
    outcome = elastic("note('ran', ATTEMPT)\nif ATTEMPT == 0 and RANK == 0:\n    die()\n")
    assert outcome.code == 0
    assert outcome.notes("ran").count("1") == 2


@pytest.mark.parametrize("flag", [(), ("--fresh",)])
def test_when_every_checkpoint_is_torn_the_run_refuses_and_fresh_starts_over(elastic: Elastic, flag: tuple) -> None:
    first = elastic("trainer().fit(Model())\n")
    for path in first.run.glob("checkpoints/fit-1/*.ckpt"):
        path.write_bytes(path.read_bytes()[:-1])
    second = elastic("trainer().fit(Model())\n", *flag)
    if flag:
        assert second.code == 0
        assert "the old run is kept in" in second.said
        assert second.notes("trained") == EVERY_STEP_ONCE * 2
    else:
        assert second.code == 74
        assert "none of the checkpoints" in second.said
        assert "--fresh" in second.said
        assert second.notes("trained") == EVERY_STEP_ONCE


def test_a_torn_newest_checkpoint_is_named_and_the_one_before_it_serves(elastic: Elastic) -> None:
    first = elastic("trainer(At(7, fall_over)).fit(Model())\n", "--checkpoint-steps", "3", "--max-restarts", "0")
    assert first.code == 1
    newest = max(first.run.glob("checkpoints/fit-1/*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    newest.write_bytes(newest.read_bytes()[:-1])
    second = elastic("trainer().fit(Model())\n")
    assert second.code == 0
    resume = second.events("resume")[-1]
    assert resume["rejected"][0]["path"] == str(newest)
    assert resume["step"] == 6


def test_resume_from_takes_a_named_checkpoint_and_refuses_a_torn_one(elastic: Elastic) -> None:
    first = elastic("trainer(At(7, fall_over)).fit(Model())\n", "--checkpoint-steps", "3", "--max-restarts", "0")
    named = first.run / "checkpoints" / "fit-1" / "step=3.ckpt"
    chosen = elastic("trainer().fit(Model())\n", "--resume-from", str(named))
    assert chosen.code == 0
    assert chosen.notes("trained")[6:] == EVERY_STEP_ONCE[3:]
    named.write_bytes(b"torn")
    refused = elastic("trainer().fit(Model())\n", "--resume-from", str(named))
    assert refused.code == 74
    assert "can't be resumed from" in refused.said


def test_a_named_checkpoint_that_goes_away_is_not_missed_once_the_run_has_one_of_its_own(
    elastic: Elastic, tmp_path: Path
) -> None:
    first = elastic("trainer(At(4, fall_over)).fit(Model())\n", "--checkpoint-steps", "3", "--max-restarts", "0")
    named = first.run.rename(tmp_path / "other") / "checkpoints" / "fit-1" / "step=3.ckpt"
    body = f"""
        def clear_away_and_die():
            if RANK == 0:
                Path({str(named)!r}).unlink()
            die()
        trainer(At(7, clear_away_and_die)).fit(Model())
    """
    outcome = elastic(body, "--checkpoint-steps", "2", "--resume-from", str(named))
    assert outcome.code == 0
    assert list(dict.fromkeys(event["step"] for event in outcome.events("resume"))) == [3, 6]
    never = elastic(body, "--fresh", "--resume-from", str(named))
    assert never.code == 2
    assert f"there is no checkpoint {named}" in never.said


FULL_FROM_4_TO_12 = """
import resource
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
full = At(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, most)))
room = At(12, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
"""
"""Meanwhile no process of the job can write more than 500 bytes into a file."""


def test_a_full_disk_costs_checkpoints_and_not_the_run(elastic: Elastic) -> None:
    outcome = elastic(f"{FULL_FROM_4_TO_12}trainer(full, room).fit(Model())\n", "--checkpoint-steps", "3")
    assert outcome.code == 0, outcome.output()
    assert outcome.notes("trained") == EVERY_STEP_ONCE
    assert {event["step"] for event in outcome.events("save_failed")} == {6, 8, 9}
    assert outcome.steps()[-1] == 16
    assert "a save failed: could not write" in outcome.said
    assert "File too large" in outcome.output()


@pytest.mark.parametrize("nodes", ["1", "1:2"])
def test_a_training_whose_end_is_not_on_disk_has_not_finished_and_the_next_start_sees_to_it(
    elastic: Elastic, nodes: str
) -> None:
    body = f"{FULL_FROM_4_TO_12}trainer(CALLBACKS).fit(Model())\nnote('after', ATTEMPT)\n"
    first = elastic(body.replace("CALLBACKS", "full"), "--checkpoint-steps", "3", "--nnodes", nodes)
    assert first.code == 74
    assert first.notes("after") == ["0", "0"]
    assert "its end is not on disk" in first.said
    assert first.steps() == [3]
    second = elastic(body.replace("CALLBACKS", ""), "--nnodes", nodes)
    assert second.code == 0
    assert second.notes("trained")[16:] == EVERY_STEP_ONCE[3:]
    assert second.steps()[-1] == 16


def test_a_full_disk_costs_no_run_whose_checkpoints_are_folders_of_shards(elastic: Elastic) -> None:
    outcome = elastic(
        f"""{FULL_FROM_4_TO_12}
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

class Sharded(Model):
    def configure_model(self):
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
trainer(full, room, strategy=strategy).fit(Sharded())
""",
        "--checkpoint-steps",
        "3",
    )
    assert outcome.code == 0, outcome.output()
    assert {event["step"] for event in outcome.events("save_failed")} == {6, 8, 9}
    assert outcome.steps()[-1] == 16
