"""A run is told to stop, by whomever, wherever it is: it saves once, on one step, and says so by its exit code."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest

from elastic_fit.supervisor.ledger import Event
from tests.agent.harness import wait_until
from tests.launching import Elastic, Outcome

EVERY_STEP_ONCE = [str(step) for step in range(1, 17)]

TELL = f"""
def to_launcher(number=signal.SIGTERM):
    return lambda: os.kill({os.getpid()}, number)

def to_me(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)

class Validated(Model):
    def validation_step(self, batch, batch_idx):
        note("validated", f"{{self.trainer.global_step}}.{{batch_idx}}.{{RANK}}")
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=2)

class AtBatch(pl.Callback):
    def __init__(self, hook, batch, act, rank=0, step=None):
        self.batch, self.act, self.rank, self.step = batch, act, rank, step
        setattr(self, hook, self.look)
    def look(self, trainer, module, outputs, batch, batch_idx, *_):
        is_there = trainer.global_step == self.step if self.step is not None else not trainer.sanity_checking
        if ATTEMPT == 0 and batch_idx == self.batch and is_there and self.rank in (None, RANK):
            self.act()
"""


def decision(outcome: Outcome) -> Event:
    decisions = outcome.events("stop_decision")
    assert len(decisions) == 1
    return decisions[0]


def goes_on(elastic: Elastic, first: Outcome, body: str = "trainer().fit(Model())\n") -> None:
    assert first.code == 75, first.said + first.output()
    second = elastic(TELL + body)
    assert second.code == 0
    assert second.notes("trained") == EVERY_STEP_ONCE


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_each_signal_to_the_launcher_saves_and_stops(elastic: Elastic, number: str) -> None:
    first = elastic(TELL + f"trainer(At(5, told(to_launcher(signal.{number})))).fit(Model())\n")
    asked = first.events("stop_requested")
    assert [(one["source"], one["reason"]) for one in asked] == [("signal", number)]
    assert first.events("save")[-1]["kind"] == "stop"
    goes_on(elastic, first)


@pytest.mark.parametrize(
    ("number", "rank"),
    [("SIGTERM", 0), ("SIGTERM", 1), ("SIGINT", 0), ("SIGHUP", 0), ("SIGUSR1", 1), ("SIGUSR2", 1)],
)
def test_a_signal_to_one_worker_stops_all_of_them_together(elastic: Elastic, number: str, rank: int) -> None:
    first = elastic(TELL + f"trainer(At(5, to_me(signal.{number}), rank={rank}), max_epochs=2000).fit(Model())\n")
    (asked,) = first.events("stop_requested")
    assert (asked["source"], asked["reason"], asked["rank"]) == ("worker", number, rank)
    assert first.code == 75
    codes = [one["code"] for one in first.events("worker_exit")]
    assert codes == [75, 75]
    assert decision(first)["step"] == first.steps()[-1]


def test_a_run_that_was_begun_anew_and_has_saved_says_that_the_same_command_would_begin_anew_again(
    elastic: Elastic,
) -> None:
    first = elastic(TELL + "trainer(At(5, told(to_launcher()))).fit(Model())\n", "--fresh")
    assert "run it again without --fresh to go on" in first.said
    goes_on(elastic, first)


def test_all_workers_signalled_at_once_save_once(elastic: Elastic) -> None:
    first = elastic(TELL + "trainer(At(5, to_me()), max_epochs=2000).fit(Model())\n")
    assert first.code == 75
    assert len(first.events("stop_requested")) == 1
    assert decision(first)["step"] == first.steps()[-1]


def test_a_second_signal_changes_nothing(elastic: Elastic) -> None:
    both = "lambda: (to_launcher()(), to_launcher(signal.SIGUSR1)(), to_me()())"
    first = elastic(TELL + f"trainer(At(5, told({both}))).fit(Model())\n")
    assert len(first.events("stop_requested")) == 1
    goes_on(elastic, first)


def test_the_same_signal_again_leaves_the_deadline_where_it_was(elastic: Elastic) -> None:
    again = "lambda: (told(to_launcher())(), time.sleep(0.5 if RANK == 0 else 0), RANK or to_launcher()())"
    first = elastic(TELL + f"trainer(At(5, {again})).fit(Model())\n")
    (asked,), (repeated,) = first.events("stop_requested"), first.events("stop_repeated")
    assert (repeated["source"], repeated["reason"]) == ("signal", "SIGTERM")
    assert repeated.t - asked.t > 0.4
    made = decision(first)
    for one, left_s in ((repeated, repeated["deadline_s"]), (made, made["left_s"])):
        assert one.t + left_s == pytest.approx(asked.t + 30.0, abs=0.2)


LONG_VALIDATION = """
pl.seed_everything(7)
class Long(Validated):
    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.3)
    def training_step(self, batch, batch_idx):
        return self.layer(self.drop(batch[0])).square().mean()
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(128.0).reshape(32, 4) / 100), batch_size=2, shuffle=True)
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(1200, 4)), batch_size=2, shuffle=True)
    def on_fit_end(self):
        note("parameters", [p.tolist() for p in self.parameters()].__repr__().replace(" ", ""))
"""


@pytest.mark.parametrize(("interval", "step"), [(1.0, 8), (0.5, 12)])
def test_a_run_stopped_in_the_middle_of_a_validation_validates_anew_and_is_the_same_run(
    elastic: Elastic, interval: float, step: int
) -> None:
    script = TELL + LONG_VALIDATION
    fit = f"trainer(CALLBACKval_check_interval={interval}).fit(Long())\n"
    at = f"AtBatch('on_validation_batch_end', 1, told(to_launcher()), rank=None, step={step}), "
    first = elastic(script + fit.replace("CALLBACK", at))
    assert first.code == 75
    assert decision(first)["step"] == step
    assert first.steps()[-1] == step
    second = elastic(script + fit.replace("CALLBACK", ""))
    assert second.code == 0
    assert second.notes("trained") == EVERY_STEP_ONCE
    validated = [note for note in second.notes("validated") if note.startswith(f"{step}.") and note.endswith(".0")]
    whole = [f"{step}.{batch}.0" for batch in range(300)]
    interrupted = validated[: -len(whole)]
    assert validated[-len(whole) :] == whole
    assert 0 < len(interrupted) < len(whole)
    undisturbed = elastic(script + fit.replace("CALLBACK", ""), "--fresh")
    again, straight = (undisturbed.notes("parameters")[at : at + 2] for at in (0, 2))
    assert again == straight


SLOW = """
class SlowAfter(pl.Callback):
    def __init__(self, step):
        self.step = step
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            time.sleep(0.6)
"""


def ends_like_an_undisturbed_run(elastic: Elastic, fit: str) -> None:
    script = TELL + LONG_VALIDATION + fit.replace("CALLBACKS", "")
    gone_on, undisturbed = elastic(script), elastic(script, "--fresh")
    assert (gone_on.code, undisturbed.code) == (0, 0)
    ends = undisturbed.notes("parameters")
    assert len(ends) == 4
    assert ends[:2] == ends[2:]


def test_a_run_stopped_in_a_validation_within_an_accumulation_is_the_same_run(elastic: Elastic) -> None:
    fit = "trainer(CALLBACKSval_check_interval=0.75, accumulate_grad_batches=4).fit(Long())\n"
    stop = "AtBatch('on_validation_batch_end', 1, told(to_launcher()), rank=None, step=1), "
    first = elastic(TELL + LONG_VALIDATION + fit.replace("CALLBACKS", stop))
    assert first.code == 75
    assert decision(first)["step"] == 1
    ends_like_an_undisturbed_run(elastic, fit)


@pytest.mark.parametrize("interval", [1.0, 0.5], ids=["", "after a validation"])
def test_a_run_stopped_within_an_accumulation_that_outlasts_the_grace_is_the_same_run(
    elastic: Elastic, interval: float
) -> None:
    fit = f"trainer(CALLBACKSval_check_interval={interval}, accumulate_grad_batches=4).fit(Long())\n"
    stop = "SlowAfter(1), AtBatch('on_train_batch_end', 4, told(to_launcher()), rank=None, step=1), "
    first = elastic(TELL + LONG_VALIDATION + SLOW + fit.replace("CALLBACKS", stop), "--grace", "1.5s")
    assert first.code == 75
    made = decision(first)
    assert made["step"] == 1
    assert made["half_accumulated"] > 0
    ends_like_an_undisturbed_run(elastic, fit)


EVALUATED = """
class Evaluated(Model):
    def predict_step(self, batch, batch_idx):
        note("evaluated", batch_idx)
    test_step = validation_step = predict_step
    def predict_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(40000, 4)), batch_size=2)
    test_dataloader = val_dataloader = predict_dataloader
"""


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_stop_between_two_batches_outside_of_a_training_ends_it_there_with_nothing_to_save(
    elastic: Elastic, stage: str
) -> None:
    hook = "on_validation_batch_end" if stage == "validate" else f"on_{stage}_batch_end"
    body = f"trainer(AtBatch({hook!r}, 3, told(to_launcher()), rank=None, step=0)).{stage}(Evaluated())\n"
    first = elastic(TELL + EVALUATED + body)
    assert first.code == 143
    assert decision(first)["why"] == "nothing is trained here"
    evaluated = [int(batch) for batch in first.notes("evaluated")]
    assert evaluated.count(3) == 2, "by both ranks"
    assert max(evaluated) < 100
    assert first.events("stragglers") == []


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_stop_in_a_test_after_the_training_says_that_all_is_saved(elastic: Elastic, stage: str) -> None:
    body = f"""
    class Long(Model):
        def {stage}_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(40000, 4)), batch_size=2)
        def predict_step(self, batch, batch_idx):
            pass
        def test_step(self, batch, batch_idx):
            pass
    t = trainer(AtBatch('on_{stage}_batch_end', 3, to_launcher(), step=8), max_epochs=1)
    m = Long()
    t.fit(m)
    t.{stage}(m)
    note("ended", "yes")
    """
    first = elastic(TELL + textwrap.dedent(body))
    assert first.code == 75
    assert first.notes("ended") == []
    assert decision(first)["save"] is False


def test_a_stop_in_the_sanity_check_of_a_new_run_has_nothing_to_save(elastic: Elastic) -> None:
    body = "trainer(AtBatch('on_validation_batch_end', 0, to_launcher(), step=0), num_sanity_val_steps=2000, "
    body += "limit_val_batches=2000).fit(Long())\n"
    long = """
class Long(Validated):
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8000, 4)), batch_size=2)
"""
    first = elastic(TELL + long + body)
    assert first.code == 143
    assert decision(first)["why"] == "nothing was trained"
    assert first.steps() == []


def test_a_stop_at_the_start_of_a_second_fit_says_that_the_first_one_is_saved(elastic: Elastic) -> None:
    body = """
class Long(Validated):
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8000, 4)), batch_size=2)
trainer(max_epochs=1).fit(Model())
stop = AtBatch('on_validation_batch_end', 0, told(to_launcher()), rank=None, step=0)
trainer(stop, num_sanity_val_steps=2000, limit_val_batches=2000).fit(Long())
"""
    first = elastic(TELL + body)
    assert first.steps()[-1] == 8
    assert decision(first)["why"] == "nothing was trained"
    assert first.code == 75


def test_never_in_the_middle_of_an_accumulation(elastic: Elastic) -> None:
    first = elastic(
        TELL
        + "trainer(AtBatch('on_train_batch_end', 1, told(to_launcher()), rank=None), accumulate_grad_batches=4)"
        + ".fit(Model())\n"
    )
    assert first.code == 75
    assert decision(first)["half_accumulated"] == 0
    second = elastic(TELL + "trainer(accumulate_grad_batches=4).fit(Model())\n")
    assert second.code == 0
    assert second.notes("trained")[-1] == "4"
    assert len(second.notes("trained")) == 16


def test_where_an_accumulation_outlasts_the_grace_the_step_before_it_is_saved(elastic: Elastic) -> None:
    body = """
import time
class Slow(Model):
    def training_step(self, batch, batch_idx):
        time.sleep(0.04)
        return super().training_step(batch, batch_idx)
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(400, 4)), batch_size=2)
trainer(AtBatch('on_train_batch_end', 51, to_launcher()), accumulate_grad_batches=50, max_epochs=1).fit(Slow())
"""
    first = elastic(TELL + body, "--grace", "1.2s")
    assert first.code == 75
    made = decision(first)
    assert made["step"] == 1
    assert 0 < made["half_accumulated"] < 50
    assert first.steps() == [1]


def test_a_rank_that_was_late_and_no_longer_is_does_not_pass_the_place_where_the_others_stop(elastic: Elastic) -> None:
    body = """
def is_there():
    return (HERE / "fifteenth").exists()

class Uneven(Model):
    def training_step(self, batch, batch_idx):
        if batch_idx == 21 and RANK == 1:
            time.sleep(1.0)  # nineteen of these would outlast the grace; the next ones are quick
        if batch_idx == 34 and RANK == 1:
            (HERE / "fifteenth").touch()
        if batch_idx == 21 and RANK == 0:
            while not is_there():
                time.sleep(0.001)
            time.sleep(1.0)
        return super().training_step(batch, batch_idx)
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(400, 4)), batch_size=2)
trainer(AtBatch('on_train_batch_end', 20, told(to_launcher()), rank=None), accumulate_grad_batches=20).fit(Uneven())
"""
    first = elastic(TELL + body, "--grace", "12s")
    assert first.code == 75, first.said
    assert first.events("stragglers") == []
    assert grace_taken_s(first) < 10


@pytest.mark.parametrize("step", [5, 6], ids=["stop", "periodic save, stop"])
def test_a_stop_with_nan_in_the_state_says_that_nothing_new_is_saved(elastic: Elastic, step: int) -> None:
    diverges = """
    class Diverges(Model):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 4:
                torch.nn.init.constant_(self.layer.weight, float("nan"))
    """
    fit = f"trainer(At({step}, told(to_launcher()))).fit(Diverges())\n"
    first = elastic(TELL + textwrap.dedent(diverges) + fit, "--checkpoint-steps", "3", "--keep", "9")
    assert first.code == 143, first.said
    *before, last = first.events("save")
    assert [one["step"] for one in before if "finite" not in one.fields] == [3]
    assert (last["kind"], last["step"], last["finite"]) == ("stop", decision(first)["step"], False)
    assert "NaN or Inf" in first.output()
    second = elastic(TELL + "trainer().fit(Model())\n")
    assert second.code == 0
    assert second.events("resume")[-1]["step"] == 3


SLOW_WRITE = """
from elastic_fit.supervisor.store import Staged
def slow(self, facts, commit=Staged.commit, **rest):
    time.sleep(1.0)
    return commit(self, facts, **rest)
Staged.commit = slow
"""
SLOW_CAPTURE = """
class Captured(Model):
    def on_save_checkpoint(self, checkpoint):
        time.sleep(1.0)
Model = Captured
"""


@pytest.mark.parametrize("slow", [SLOW_WRITE, SLOW_CAPTURE], ids=["write", "capture"])
def test_no_save_is_started_that_cannot_end_in_time(elastic: Elastic, slow: str) -> None:
    body = slow + "trainer(At(5, told(to_launcher()))).fit(Model())\n"
    first = elastic(TELL + body, "--checkpoint-steps", "4", "--grace", "1s")
    assert first.code == 143
    made = decision(first)
    assert made["save"] is False
    assert "the checkpoint of step 4 stays the newest" in made["why"]
    assert 0 < made["left_s"] <= 1
    assert made["predicted_s"] >= 1
    assert first.steps() == [4]


@pytest.mark.parametrize(("second_s", "code"), [(60.0, 143), (0.0, 75)], ids=["in vain", "in time"])
def test_a_save_that_may_not_end_in_time_is_tried_where_nothing_new_is_there_and_leaves_what_is_there_whole(
    elastic: Elastic, second_s: float, code: int
) -> None:
    body = """
from elastic_fit.supervisor.store import Staged
def slow(self, facts, commit=Staged.commit, **rest):
    time.sleep({seconds})
    return commit(self, facts, **rest)
Staged.commit = slow
trainer(At({step}, told(to_launcher()))).fit(Model())
"""
    first = elastic(TELL + body.format(seconds=2.5, step=2))
    (began,) = first.steps()
    second = elastic(TELL + body.format(seconds=second_s, step=began + 2), "--grace", "3s")
    made = second.events("stop_decision")[-1]
    assert made["save"] is True
    assert "trying all the same, as nothing new was saved since the start" in made["why"]
    assert made["predicted_s"] >= 2.5
    newest = made["step"] if code == 75 else began
    assert (second.code, second.steps()[-1]) == (code, newest)
    third = elastic(TELL + "trainer().fit(Model())\n")
    assert third.code == 0
    assert third.events("resume")[-1]["step"] == newest
    assert [int(step) for step in third.notes("trained")] == [*range(1, made["step"] + 1), *range(newest + 1, 17)]


def grace_taken_s(outcome: Outcome) -> float:
    """From the request to the end of the last worker."""
    return outcome.events("stopped")[0].t - outcome.events("stop_requested")[0].t


def test_a_straggler_is_killed_at_the_deadline_and_its_stack_is_in_its_log(elastic: Elastic) -> None:
    body = """
import time
def sleep_for_long():
    time.sleep(60)
class Stuck(Model):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5 and RANK == 1:
            to_launcher()()
            sleep_for_long()
        return super().training_step(batch, batch_idx)
trainer().fit(Stuck())
"""
    first = elastic(TELL + body, "--grace", "1s")
    assert first.code == 143
    assert sorted(first.events("stragglers")[0]["ranks"]) == [0, 1]
    assert "in sleep_for_long" in first.output()
    assert 1.0 <= grace_taken_s(first) < 4


def test_a_frozen_rank_does_not_hold_the_run_beyond_its_grace(elastic: Elastic) -> None:
    body = "lambda: (to_launcher()(), os.kill(os.getpid(), signal.SIGSTOP))"
    first = elastic(TELL + f"trainer(At(5, {body}, rank=1)).fit(Model())\n", "--grace", "1s")
    assert first.code == 143
    assert 1.0 <= grace_taken_s(first) < 4


def test_a_stop_right_after_a_death_leaves_the_survivor_to_save_what_it_holds(elastic: Elastic, tmp_path: Path) -> None:
    body = f"""
from elastic_fit.callbacks import session
from elastic_fit.supervisor.ledger import read

class Dies(Validated):
    def validation_step(self, batch, batch_idx):
        if RANK == 1:
            die()
        if batch_idx == 0:
            told(lambda: None)()  # by its peer's death
            to_launcher()()
            while not any(one.event == "stop_requested" for one in read({str(tmp_path / "run" / "events.jsonl")!r})):
                time.sleep(0.001)
        time.sleep(0.05)
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(1200, 4)), batch_size=2)

trainer(num_sanity_val_steps=0).fit(Dies())
"""
    first = elastic(TELL + body, "--grace", "5s")
    assert first.code == 75, first.said + first.output()
    assert [one["step"] for one in first.events("rescue")] == [8]
    assert first.events("stragglers") == []
    goes_on(elastic, first)


STOPPED_BEFORE_ITS_FIRST_STEP = """
if ATTEMPT == 1:
    to_launcher()()
    time.sleep(60)
"""


@pytest.mark.parametrize("nodes", ["1", "1:2"])
@pytest.mark.parametrize(
    ("victims", "flags", "saved"),
    [("(1,)", (), 5), ("(0, 1)", ("--checkpoint-steps", "3"), 3)],
    ids=["rescued", "saved before"],
)
def test_a_stop_before_the_first_step_after_a_restart_ends_as_saved_where_this_command_has_saved(
    elastic: Elastic, nodes: str, victims: str, flags: tuple[str, ...], saved: int
) -> None:
    flags = ("--nnodes", nodes, *flags)
    dies = f"trainer(At(5, lambda: die() if RANK in {victims} else None)).fit(Model())\n"
    first = elastic(TELL + STOPPED_BEFORE_ITS_FIRST_STEP + dies, *flags)
    assert first.steps() == [saved], first.said + first.output()
    assert (first.code, first.events("finish")[0]["code"]) == (75, 75), first.said
    assert len(first.events("workers_started")) == 2
    again = elastic(TELL + "to_launcher()()\ntime.sleep(60)\n", *flags)
    assert again.code == 143, "this one has saved nothing new"
    last = elastic(TELL + "trainer().fit(Model())\n", *flags)
    assert last.code == 0
    assert last.events("resume")[-1]["step"] == saved


@pytest.mark.parametrize("nodes", ["1", "1:2"])
def test_a_stop_without_a_save_never_ends_as_saved(elastic: Elastic, tmp_path: Path, nodes: str) -> None:
    order = f"[{sys.executable!r}, '-m', 'elastic_fit', 'stop', {str(tmp_path / 'run')!r}, '--no-save']"
    body = f"""
    if ATTEMPT == 1:
        if RANK == 0:
            __import__("subprocess").Popen({order}, start_new_session=True)
        time.sleep(60)
    trainer(At(5, die, rank=1)).fit(Model())
    """
    first = elastic(body, "--nnodes", nodes)
    assert (first.steps(), first.code) == ([5], 143), first.said


def test_a_stop_that_loses_steps_does_not_end_as_saved_for_what_was_rescued_before(elastic: Elastic) -> None:
    body = """
    class Stuck(Model):
        def training_step(self, batch, batch_idx):
            if ATTEMPT == 1 and self.global_step == 7:
                to_launcher()()
                time.sleep(60)
            return super().training_step(batch, batch_idx)
    trainer(At(5, die, rank=1)).fit(Stuck())
    """
    first = elastic(TELL + textwrap.dedent(body), "--grace", "1s")
    assert (first.steps(), first.code) == ([5], 143), first.said


def test_a_signal_to_a_survivor_that_saves_stops_the_run_once_it_has(elastic: Elastic) -> None:
    body = """
class Rescues(Model):
    def on_save_checkpoint(self, checkpoint):
        if ATTEMPT == 0:
            told(lambda: None)()  # by its peer's death
            to_me()()

trainer(At(5, die, rank=1)).fit(Rescues())
"""
    first = elastic(TELL + body)
    (asked,) = first.events("stop_requested")
    assert (asked["source"], asked["reason"], asked["rank"]) == ("worker", "SIGTERM", 0)
    assert [one["step"] for one in first.events("rescue")] == [5]
    assert len(first.events("workers_started")) == 1
    goes_on(elastic, first)


def test_a_worker_that_is_sent_away_from_its_imports_after_a_death_asks_for_no_stop(elastic: Elastic) -> None:
    body = """
if ATTEMPT == 0 and RANK == 1:
    time.sleep(0.5)
    die()
if ATTEMPT == 0:
    time.sleep(60)
trainer().fit(Model())
"""
    outcome = elastic(body)
    assert outcome.code == 0, outcome.said + outcome.output()
    assert outcome.events("stop_requested") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_during_the_imports_of_one_rank_ends_at_once(elastic: Elastic, rank: int) -> None:
    body = f"if RANK == {rank}:\n    import time; to_launcher()(); time.sleep(60)\ntrainer().fit(Model())\n"
    first = elastic(TELL + body)
    assert first.code == 143
    assert grace_taken_s(first) < 10, "they don't wait for the deadline"


def test_a_signal_to_one_worker_during_its_imports_stops_the_run_and_restarts_nothing(elastic: Elastic) -> None:
    first = elastic(TELL + "if RANK == 1:\n    import time; to_me()(); time.sleep(60)\ntrainer().fit(Model())\n")
    assert first.code == 143
    assert len(first.events("workers_started")) == 1


def test_a_script_without_a_trainer_that_computes_in_native_code_as_it_is_told_to_stop_ends_in_good_order(
    elastic: Elastic,
) -> None:
    body = """
import ctypes, threading
from elastic_fit.callbacks import release, session

def end_kernel():
    told(lambda: None)()
    time.sleep(4 * release.PATIENCE_S)
    native.pthread_barrier_wait(kernel)

native = ctypes.CDLL(None)
kernel = ctypes.create_string_buffer(64)
native.pthread_barrier_init(kernel, None, 2)
threading.Thread(target=end_kernel).start()
try:
    to_launcher()()
    native.pthread_barrier_wait(kernel)
    time.sleep(60)
finally:
    note("saved", "by itself")
"""
    first = elastic(TELL + body, workers=1)
    assert first.code == 143
    assert first.notes("saved") == ["by", "itself"]
    assert grace_taken_s(first) < 20


TEARS_DOWN = """
import atexit
atexit.register(to_me())

class Torn(pl.Callback):
    def on_exception(self, *_):
        to_me()()
    def teardown(self, *_, stage):
        to_me()()
"""

MIDDLE = """
import threading
import torch.distributed as dist

# Rank 1 begins when it has heard of the stop; rank 0 waits for it meanwhile.
def stop_in_the_middle(teller, act, init=dist.init_process_group):
    def init_process_group(*args, **options):
        if RANK == teller:
            threading.Timer(0.0, act).start()
        if RANK == 1:
            told(lambda: None)()
        return init(*args, **options)
    dist.init_process_group = init_process_group
"""


@pytest.mark.parametrize(("teller", "act"), [(0, "to_launcher()"), (1, "to_me()")])
def test_a_stop_while_one_rank_waits_in_init_process_group_for_the_other_ends_both(
    elastic: Elastic, teller: int, act: str
) -> None:
    aimed = f"stop_in_the_middle({teller}, {act})\n"
    first = elastic(TELL + MIDDLE + aimed + "trainer(max_epochs=2000).fit(Model())\n")
    assert first.code == 143, first.output()
    assert len(first.events("workers_started")) == 1


def test_a_rank_does_not_wait_for_a_peer_that_has_left_before_it_came_to_its_trainer(elastic: Elastic) -> None:
    """Rank 0 is there already, and waits where nobody hears of the end of a peer."""
    body = """
import datetime, time
from lightning.pytorch.callbacks import Checkpoint

class Late(pl.Callback):
    def setup(self, trainer, module, stage):
        if RANK == 1:
            while not (HERE / "waits").exists():
                time.sleep(0.001)
            to_launcher()()
            time.sleep(60)

class Waits(Checkpoint):  # such callbacks are called after all others
    def setup(self, trainer, module, stage):
        if RANK == 0:
            (HERE / "waits").touch()
            store = torch.distributed.distributed_c10d._get_default_store()
            store.wait(["from rank 1"], datetime.timedelta(minutes=5))

trainer(Late(), Waits(), enable_checkpointing=True).fit(Model())
"""
    first = elastic(TELL + body)
    assert first.code == 143
    assert first.events("stragglers") == []
    codes = {one["rank"]: one["code"] for one in first.events("worker_exit")}
    assert codes == {0: 1, 1: 143}


BLOCKS = "import elastic_fit\nelastic_fit.on_stop_notice(lambda: time.sleep(600))\n"


@pytest.mark.parametrize(("rank", "before"), [(1, ""), (0, BLOCKS)], ids=["", "a notice blocks"])
def test_a_signal_to_one_rank_is_heard_at_once_while_it_waits_in_a_collective(
    elastic: Elastic, rank: int, before: str
) -> None:
    body = f"""
STRUCK = {rank}
{before}"""
    body += """
import linecache, sys, threading
from elastic_fit.callbacks import session

def strike_in_the_collective():
    main = threading.main_thread().ident
    line = ""
    while "_execution_engine.run_backward(" not in line:  # one that is still on its way there hears by itself
        time.sleep(0.001)
        frame = sys._current_frames()[main]
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    note("told", time.time())
    os.kill(os.getpid(), signal.SIGTERM)

class Apart(Model):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5 and RANK == STRUCK:
            threading.Thread(target=strike_in_the_collective).start()
        if self.global_step == 5 and RANK != STRUCK:
            limit = time.monotonic() + 20
            while not session.current().board.request and time.monotonic() < limit:
                time.sleep(0.001)
        return super().training_step(batch, batch_idx)

trainer(max_epochs=2000).fit(Apart())
"""
    first = elastic(TELL + body)
    (asked,) = first.events("stop_requested")
    assert (asked["source"], asked["reason"], asked["rank"]) == ("worker", "SIGTERM", rank)
    assert asked.t - float(first.notes("told")[0]) < 1
    assert first.code == 75


def test_a_script_that_has_signals_written_to_its_own_event_loop_keeps_that_and_is_heard_as_well(
    elastic: Elastic,
) -> None:
    body = """
import asyncio, threading

def serve():
    loop.run_until_complete(arrived.wait())

loop = asyncio.new_event_loop()
arrived = asyncio.Event()
loop.add_signal_handler(signal.SIGWINCH, arrived.set)
server = threading.Thread(target=serve, daemon=True)
server.start()

def to_both():
    os.kill(os.getpid(), signal.SIGWINCH)
    server.join(20)
    note("served", not server.is_alive())
    to_me()()

trainer(At(5, to_both, rank=1), max_epochs=2000).fit(Model())
"""
    first = elastic(TELL + body)
    assert first.code == 75, first.output()
    assert first.notes("served") == ["True"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_saves_a_step_again_whose_save_has_just_failed(elastic: Elastic, workers: int) -> None:
    body = """
import errno
from elastic_fit.supervisor.store import Staged, SaveFailed
def commit(self, facts, commit=Staged.commit, **rest):
    if facts.step == 5 and facts.kind != "stop":
        raise SaveFailed(self.target, OSError(errno.ENOSPC, "no space"))
    return commit(self, facts, **rest)
Staged.commit = commit
trainer(At(5, told(to_launcher()))).fit(Model())
"""
    first = elastic(TELL + body, "--checkpoint-steps", "5", workers=workers)
    assert [one["step"] for one in first.events("save_failed")] == [5]
    assert first.code == 75
    assert decision(first)["step"] == first.steps()[-1]


def test_a_signal_while_a_stopped_rank_tears_down_does_not_undo_that_it_has_saved(elastic: Elastic) -> None:
    first = elastic(TELL + TEARS_DOWN + "trainer(Torn(), At(5, told(to_launcher()))).fit(Model())\n")
    assert [one["code"] for one in first.events("worker_exit")] == [75, 75]
    goes_on(elastic, first)


def test_a_signal_while_a_finished_training_tears_down_lets_it_finish(elastic: Elastic) -> None:
    first = elastic(TELL + TEARS_DOWN + "trainer(Torn()).fit(Model())\n")
    assert first.code == 0, first.said + first.output()
    assert first.steps()[-1] == 16


def test_a_stop_when_training_is_over_lets_it_finish(elastic: Elastic) -> None:
    first = elastic(TELL + "trainer().fit(Model())\nif RANK == 0: to_launcher()()\n")
    assert first.code == 0


def test_dataloader_workers_do_not_get_in_the_way_of_a_stop(elastic: Elastic) -> None:
    loader = """
class Loaded(Model):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=2, num_workers=2)
"""
    first = elastic(TELL + loader + "trainer(At(5, told(to_launcher()))).fit(Loaded())\n")
    assert first.code == 75
    second = elastic(TELL + loader + "trainer().fit(Loaded())\n")
    assert second.code == 0
    assert second.notes("trained") == EVERY_STEP_ONCE


READERS = """
import psutil, time

def readers():
    return psutil.Process().children()

def to_group(number):
    return lambda: os.killpg(os.getpgrp(), number)

class Read(Model):
    def train_dataloader(self):
        return DataLoader(Lines(), batch_size=2, num_workers=2)

class Lines(torch.utils.data.Dataset):
    def __len__(self):
        return 8000
    def __getitem__(self, index):
        return (torch.full((4,), index / 8000),)
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_all_processes_of_the_job_also_to_those_that_read_its_data_saves_and_stops(
    elastic: Elastic, number: str
) -> None:
    first = elastic(TELL + READERS + f"trainer(At(5, to_group(signal.{number}))).fit(Read())\n")
    assert first.code == 75, first.said + first.output()
    assert [one["code"] for one in first.events("worker_exit")] == [75, 75]
    assert first.events("rescue") == []
    assert decision(first)["step"] == first.steps()[-1]


def test_a_signal_to_a_process_that_reads_data_stops_the_job_like_one_to_its_rank(elastic: Elastic) -> None:
    tell = "lambda: readers()[0].terminate()"
    first = elastic(TELL + READERS + f"trainer(At(5, {tell}, rank=1)).fit(Read())\n")
    (asked,) = first.events("stop_requested")
    assert (asked["source"], asked["reason"], asked["rank"]) == ("worker", "SIGTERM", 1)
    assert [one["code"] for one in first.events("worker_exit")] == [75, 75]


def test_a_process_that_hangs_over_its_data_is_still_ended_with_its_loader_or_its_rank(elastic: Elastic) -> None:
    body = """
class Hangs(Lines):
    def __getitem__(self, index):
        if index >= 100:
            time.sleep(1000)
        return super().__getitem__(index)

def read():
    batches = iter(DataLoader(Hangs(), batch_size=50, num_workers=1, sampler=[*range(8000)]))
    next(batches)
    return batches, readers()

class Reads(pl.Callback):
    def on_train_start(self, trainer, module):
        batches, left = read()
        del batches
        note("left", len(psutil.wait_procs(left, timeout=60)[1]))

trainer(Reads(), max_epochs=1).fit(Model())
batches, left = read()
"""
    outcome = elastic(TELL + READERS + body, workers=1)
    assert outcome.code == 0, outcome.output()
    assert outcome.notes("left") == ["0"]


def test_a_process_that_was_forked_to_read_data_and_never_begins_costs_a_restart_and_no_step(elastic: Elastic) -> None:
    body = """
import pathlib, sys
import elastic_fit.callbacks._dataloader as adapter
adapter.START_S = 1.0

def hang_once():  # where Python itself may stand before 3.12: in the child, before anything of torch's or ours
    seen = pathlib.Path(sys.argv[0]).with_name("hung")
    if not seen.exists():
        seen.touch()
        time.sleep(1000)

os.register_at_fork(after_in_child=hang_once)
trainer(max_steps=16).fit(Read())
"""
    outcome = elastic(TELL + READERS + body, workers=1)
    assert outcome.code == 0, outcome.said + outcome.output()
    assert "has never begun" in outcome.output()
    assert len(outcome.events("decision")) == 1
    assert outcome.notes("trained") == EVERY_STEP_ONCE


def test_a_process_of_the_scripts_own_that_it_ends_by_sigterm_ends_and_stops_nothing(
    elastic: Elastic,
) -> None:
    body = """
import multiprocessing, time

def serve(ready):
    ready.set()
    time.sleep(60)

def employ():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    helper = context.Process(target=serve, args=(ready,))
    helper.start()
    ready.wait(20)
    helper.terminate()
    helper.join(20)
    note("helper", helper.exitcode)
    helper.kill()

trainer(At(5, employ, rank=0)).fit(Model())
"""
    outcome = elastic(TELL + body)
    assert outcome.notes("helper") == ["-15"]
    assert outcome.events("stop_requested") == []
    assert outcome.code == 0


def test_a_file_and_a_callable_stop_it_as_well(elastic: Elastic, tmp_path: Path) -> None:
    touch = f"lambda: Path({str(tmp_path / 'spot')!r}).touch()"
    first = elastic(
        TELL + f"trainer(At(5, {touch}, rank=0), max_epochs=2000).fit(Model())\n", "--stop-file", str(tmp_path / "spot")
    )
    assert (first.code, first.events("stop_requested")[0]["source"]) == (75, "file")
    notice = "elastic_fit.on_stop_notice(lambda: 'reclaimed at noon', every_s=0.1)"
    second = elastic(TELL + f"import elastic_fit\n{notice}\ntrainer(max_epochs=2000).fit(Model())\n", "--fresh")
    assert second.code in (75, 143)
    assert second.events("stop_requested")[0]["source"] == "notice"
    assert "reclaimed at noon" in second.output()


COMMAND = f"lambda: __import__('subprocess').Popen([{sys.executable!r}, '-m', 'elastic_fit', 'stop', %s])"


@pytest.mark.parametrize("flag", ["--save", "--no-save"])
def test_the_command_stops_a_run_and_says_what_happened(elastic: Elastic, tmp_path: Path, flag: str) -> None:
    arguments = f"{str(tmp_path / 'run')!r}, {flag!r}, '--wait'"
    command = (COMMAND % arguments).replace("])", "], start_new_session=True)")
    first = elastic(TELL + f"trainer(At(5, {command}, rank=0), max_epochs=20000).fit(Model())\n")
    assert first.code == (75 if flag == "--save" else 143)
    asked = first.events("stop_requested")[0]
    assert (asked["source"], asked["save"]) == ("command", flag == "--save")
    assert not (tmp_path / "run" / "stop").exists()


def test_the_command_hears_how_a_stop_ends_that_somebody_else_has_asked_for(elastic: Elastic, tmp_path: Path) -> None:
    body = f"""
import subprocess
from elastic_fit.supervisor.ledger import read

def ask_as_well():
    told(to_launcher())()
    if RANK == 0:
        command = "{sys.executable} -m elastic_fit stop run --wait > said; echo $? > code.new; mv code.new code"
        subprocess.Popen(["sh", "-c", command], cwd={str(tmp_path)!r}, start_new_session=True)
        while not any(one.event == "stop_repeated" for one in read({str(tmp_path / "run" / "events.jsonl")!r})):
            time.sleep(0.01)

trainer(At(5, ask_as_well)).fit(Model())
"""
    first = elastic(TELL + body)
    assert first.code == 75
    wait_until((tmp_path / "code").exists)
    assert (tmp_path / "said").read_text().startswith("stopped (exit 75)")
    assert (tmp_path / "code").read_text() == "0\n"


def test_the_command_says_when_nothing_runs(tmp_path: Path, elastic: Elastic, capsys: pytest.CaptureFixture) -> None:
    from elastic_fit.launch.cli import main

    outcome = elastic("trainer(max_epochs=1).fit(Model())\n", workers=1)
    assert main(["stop", str(outcome.run)]) == 1
    assert "nothing runs there" in capsys.readouterr().out
    assert main(["stop", str(tmp_path)]) == 2
