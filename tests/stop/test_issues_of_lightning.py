"""What users of Lightning have reported about stops and failures, by its number there, told as they met it."""

from __future__ import annotations

import os

from tests.launching import Elastic

LAUNCHER = os.getpid()


def test_20806_rank_0_gets_sigterm_while_the_others_are_in_the_next_step(elastic: Elastic) -> None:
    """SIGTERMException is not raised consistently across all ranks in DDP: those in the next step wait for ever."""
    body = """
    import time
    class Slow(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if RANK == 0 and trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(2)  # the others have long begun the next step, and wait there
    trainer(Slow(), max_epochs=2000).fit(Model())
    """
    outcome = elastic(body)
    assert outcome.code == 75
    assert [one["code"] for one in outcome.events("worker_exit")] == [75, 75]
    assert outcome.steps()[-1] == outcome.events("stop_decision")[0]["step"]


def test_21406_a_signal_in_the_middle_of_a_backward_pass_does_not_save_there(elastic: Elastic) -> None:
    """Checkpointing in signal handlers leads to intermittent failures: in a backward pass, or inside of a save."""
    body = """
    class Told(Model):
        def backward(self, loss):
            if self.global_step == 5 and RANK == 0:
                os.kill(os.getpid(), signal.SIGUSR1)
                note("in-backward", len(list((HERE / "run" / "checkpoints").rglob("*.ckpt"))))
            super().backward(loss)
            if self.global_step == 5 and RANK == 0:
                note("in-backward", len(list((HERE / "run" / "checkpoints").rglob("*.ckpt"))))
    trainer(max_epochs=2000).fit(Told())
    """
    outcome = elastic(body)
    assert outcome.code == 75
    assert outcome.notes("in-backward") == ["0", "0"], "the handler has saved nothing"
    assert outcome.steps()[-1] >= 6


def test_20542_a_job_that_is_told_by_sigterm_that_its_time_is_up_saves_and_can_be_put_back(elastic: Elastic) -> None:
    """Unable to requeue a job after SIGTERM on SLURM: at the time limit every process of the step gets one, unwarned;
    "Bypassing SIGTERM", and training goes on until it is killed. (On a real SLURM: `tests/slurm`.)
    """
    body = f"""
    def time_is_up():
        for number in (signal.SIGCONT, signal.SIGTERM):
            os.kill({LAUNCHER}, number)
            os.kill(os.getpid(), number)
    trainer(At(5, told(time_is_up))).fit(Model())
    """
    outcome = elastic(body)
    assert outcome.code == 75
    took = outcome.events("stopped")[0].t - outcome.events("stop_requested")[0].t
    assert took < 10
    assert "Bypassing" not in outcome.output()
    again = elastic(body.replace("At(5, told(time_is_up))", ""))
    assert again.code == 0
    assert again.notes("trained") == [str(step) for step in range(1, 17)]


def test_20347_a_script_that_always_resumes_from_the_job_s_own_checkpoint_can_start(elastic: Elastic) -> None:
    """Can't resume automatically a job, ckpt_path="hpc" throws ValueError from the start: nothing is there yet."""
    outcome = elastic('trainer(At(5, die, rank=1)).fit(Model(), ckpt_path="hpc")\n')
    assert outcome.code == 0
    assert outcome.events("rescue")[0]["step"] == 5
    assert outcome.notes("trained") == [str(step) for step in range(1, 17)], "and goes on when it is started again"


def test_14893_signals_that_a_scheduler_sends_on_top_are_not_bypassed_and_do_no_harm(elastic: Elastic) -> None:
    """Lightning gets a lot of SIGTERMs from another manager of SLURM's (submitit), and bypasses them."""
    body = f"""
    def many():
        for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGCONT, signal.SIGTERM, signal.SIGUSR2):
            os.kill({LAUNCHER}, number)
            os.kill(os.getpid(), number)
    trainer(At(5, many), max_epochs=2000).fit(Model())
    """
    outcome = elastic(body)
    assert outcome.code == 75
    assert len(outcome.events("stop_requested")) == 1
    assert [one["step"] for one in outcome.events("stop_decision")] == outcome.steps()[-1:]


def test_20187_an_exception_on_one_rank_is_seen_and_saved_and_no_collective_waits_for_it(elastic: Elastic) -> None:
    """OnExceptionCheckpoint suppresses exceptions and results in an NCCL timeout: its save waits for the others."""
    outcome = elastic("trainer(At(5, fall_over, rank=1)).fit(Model())\n")
    assert outcome.code == 0
    assert "RuntimeError: the script's own mistake" in outcome.said
    assert outcome.events("rescue")[0]["step"] == 5
    assert outcome.events("teardown")[0]["seconds"] < 10


def test_8130_an_error_of_one_rank_in_the_validation_does_not_hang_the_others(elastic: Elastic) -> None:
    """DDP script hangs forever if one child process dies (of an error in its validation step)."""
    body = """
    class Falls(Model):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.layer(batch[0]).square().mean(), sync_dist=True)
            if RANK == 1 and ATTEMPT == 0 and self.global_step == 8:
                fall_over()
        def val_dataloader(self):
            return DataLoader(TensorDataset(torch.ones(12, 4)), batch_size=2)
    trainer().fit(Falls())
    """
    outcome = elastic(body)
    assert outcome.code == 0
    assert "RuntimeError: the script's own mistake" in outcome.said
    assert outcome.events("rescue")[0]["step"] == 8
    assert outcome.notes("trained") == [str(step) for step in range(1, 17)]


def test_9567_a_machine_that_is_about_to_be_taken_away_stops_at_a_place_to_go_on_from(elastic: Elastic) -> None:
    """Add support for gracefully exiting when preemptive instances are being retracted: at a reproducible place."""
    notice = "import elastic_fit; elastic_fit.on_stop_notice((HERE / 'notice').exists, every_s=0.1)\n"
    fit = "trainer(At(3, (HERE / 'notice').touch, rank=0), accumulate_grad_batches=2, max_epochs=2000).fit(Model())\n"
    outcome = elastic(notice + fit)
    assert outcome.code == 75
    assert outcome.events("stop_requested")[0]["source"] == "notice"
    assert outcome.events("stop_decision")[0]["half_accumulated"] == 0
