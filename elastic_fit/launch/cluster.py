"""The agent of one node among several: every round is decided by one node and followed by all."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec

from elastic_fit.launch._torchelastic import Result
from elastic_fit.launch.agent import ElasticAgent
from elastic_fit.launch.attempt import Attempt, Program
from elastic_fit.launch.effects import Effects, Limits
from elastic_fit.launch.membership import ElasticRendezvous
from elastic_fit.launch.rounds import Change, Gathered, JobClosed, Report, Verdict
from elastic_fit.supervisor.board import StopMode
from elastic_fit.supervisor.context import ResumePoint
from elastic_fit.supervisor.errors import StorageError
from elastic_fit.supervisor.exits import Exit as Status
from elastic_fit.supervisor.goodput import Goodput
from elastic_fit.supervisor.membership import NAMES_TOLD
from elastic_fit.supervisor.policy import (
    Failure,
    GiveUp,
    History,
    Restart,
    RestartPolicy,
    WorkerFailure,
    decide,
    root_cause,
)
from elastic_fit.supervisor.roster import Cause
from elastic_fit.supervisor.stop import StopRequest
from elastic_fit.supervisor.wish import Wish

VERDICT_S = 10.0
"""How long after a stop's deadline a node waits to hear how the job has ended."""
PEACEFUL = (Cause.JOIN, Cause.LEAVE, Cause.STOP)
"""Why workers are asked to end all at one step."""


class StoppedWaiting(Exception):
    """A signal has ended this node's wait for a round."""


class ClusterAgent(ElasticAgent):
    """Runs this node's part of a job of several nodes.

    The leader of a round decides for all: resume point, attempt, what a failure means, whether the job ends. The
    others read it with the roster and do, and print, the same.

    Args:
        rendezvous: the members' meeting place, the same object as the spec's handler.
        settle: which checkpoint the command line asks for, of a job that begins under that generation.
        tally: the run's account so far; taken once, by the node that closes the job, so that all tell the same.
        waiting: told, about twice a second, what this node waits for.
        news: told what has happened to the job, in a line for people.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        program: Program,
        effects: Effects,
        rendezvous: ElasticRendezvous,
        *,
        policy: RestartPolicy,
        limits: Limits,
        settle: Callable[[int], Wish],
        tally: Callable[[], Goodput | None],
        waiting: Callable[[str], None],
        news: Callable[[str], None],
    ) -> None:
        super().__init__(spec, program, effects, policy=policy, limits=limits)
        self._rendezvous_of_nodes = rendezvous
        self.tally: Goodput | None = None
        """The run's account as the job was closed with it; None where it was not."""
        self._settle = settle
        self._take_tally = tally
        self._waiting = waiting
        self._news = news
        self._nodes: tuple[str, ...] = ()
        self._ended_for: Change | None = None
        self._own_failures: Sequence[WorkerFailure] = ()
        self.leaves = False
        """Whether this node ends, and the job without it doesn't."""
        self._waits_no_more = False
        self._unbound = effects.ledger
        rendezvous.lead(self._judge_round)
        rendezvous.idle = self._while_waiting

    # the life of the job on this node

    def supervise(self) -> Result:
        """Take part in round after round until the job is closed."""
        while True:
            attempt = self._join_round()
            if isinstance(attempt, Result):
                return attempt
            self._follow(attempt)
            if self.leaves:
                attempt.finish()
                return self._ended_by_stop()
            self._rendezvous_of_nodes.report(self._report(attempt))
            attempt.finish()

    def _join_round(self) -> Attempt | Result:
        fx = self._fx
        self._wait_for_nursery()
        if self._stop is not None and self._attempt is None:
            return self._ended_by_stop()
        ended_for, self._ended_for = self._ended_for, None
        started = fx.now_ns()
        try:
            group = self.form(self.restarts)
        except JobClosed as end:
            return self._closed(end)
        except StoppedWaiting:
            return self._ended_by_stop()
        facts = self._rendezvous_of_nodes.decision
        generation = self._rendezvous_of_nodes.generation
        self._fx = fx = replace(fx, ledger=self._unbound.bind(generation=generation))
        self.restarts = int(facts["restarts"])
        self._take_over(facts)
        self._check_resume_is_visible()
        self._tell_failure(facts)
        if self._nodes and facts["why"] and (ended_for is None or ended_for.cause is not Cause.LOST):
            self._news(facts["why"])  # this node's workers had failed of the loss before it was known as one
        attempt = self._fork(int(facts["attempt"]), group, started)
        self._tell_nodes(facts)
        if self._stop is not None:  # it came while the round was formed; the other nodes hear of it by now
            self._ask(attempt, self._stop.mode, self._stop.deadline_ns)
        return attempt

    def _take_over(self, facts: Mapping[str, Any]) -> None:
        """What the job goes by, as the round's leader has decided."""
        self._wish, self._began = Wish.parse(facts["wish"]), int(facts["began"])
        self._resume = tuple(ResumePoint(**point) for point in facts["resume"])

    def _tell_nodes(self, facts: Mapping[str, Any]) -> None:
        """Who is in, where that has changed. A node alone that was never anything else has nothing to tell."""
        before, self._nodes = self._nodes, self._rendezvous_of_nodes.names
        if self._nodes == (before or self._nodes[:1]):
            return
        gone = ", ".join(facts.get("gone", ()))
        step = max((point.step for point in self._resume), default=0)
        count = f"{len(self._nodes)} node{'s' if len(self._nodes) > 1 else ''}"
        names = ", ".join(self._nodes[:NAMES_TOLD]) + (" ..." if len(self._nodes) > NAMES_TOLD else "")
        self._news(f"nodes    {count}: {names}{f'; without {gone}' if gone else ''}; going on from step {step}")

    def _check_resume_is_visible(self) -> None:
        for point in self._resume:
            if not point_exists(point):
                raise StorageError(
                    f"this node can't see the checkpoint that the job goes on from: {point.path}",
                    hint="all nodes of a job need the same run folder on a shared file system",
                )

    def layout(self) -> Sequence[int]:
        """Number of workers of every node, from the roster."""
        return self._rendezvous_of_nodes.layout

    def missing(self) -> list[str]:
        """Names of the nodes that the job has lost and not yet gone on without."""
        return list(self._rendezvous_of_nodes.missing)

    def wait_for_other_nodes(self) -> None:
        """Nothing: the job is closed only when all nodes have reported."""

    def _while_waiting(self, why: str) -> None:
        self._note_signals()
        if self._stop is not None and (
            self.leaves
            or self._waits_no_more
            or not self._rendezvous_of_nodes.is_member
            or self._fx.now_ns() >= self._stop.deadline_ns + int(VERDICT_S * 1e9)
        ):
            raise StoppedWaiting
        self._waiting(why)

    def _closed(self, end: JobClosed) -> Result:
        self.status = Status(end.status)
        self.tally = Goodput(**end.decision["tally"]) if "tally" in end.decision else None
        self._tell_failure(end.decision)
        if self.status is Status.FAILED and not end.decision.get("failure"):
            self._news(f"decision the run ends: {end}")
        has_finished = self.status in (Status.FINISHED, Status.STORAGE)
        name = "closed" if has_finished else "stopped"
        self._fx.ledger.write(name, code=int(self.status), why=str(end), missing=self.missing())
        return Result(succeeded=has_finished, stopped=self.status != Status.FAILED)

    def _tell_failure(self, facts: Mapping[str, Any]) -> None:
        told = facts.get("failure")
        if not told:
            return
        decision = GiveUp(**told["decision"]) if told["gives_up"] else Restart(**told["decision"])
        root = _failure(told["root"])
        if root not in self._own_failures:  # its worker's output is on another node's console
            root = replace(root, shown=False)
        self._fx.observer.failed(root, decision, reached=told["reached"], resume=told["resume"])

    # what ends a round

    def _others(self) -> list[int]:
        return [self._rendezvous_of_nodes.fileno()]

    def _note_others(self, attempt: Attempt, ending_ns: int) -> int:
        change = self._rendezvous_of_nodes.change()
        if change is None:
            return ending_ns
        self._fx.ledger.write(
            "membership", change=change.cause.name.lower() if change.cause is not None else "fenced", why=change.why
        )
        if change.cause is not None:
            self._news(change.why)
        if change.cause is not Cause.FAILED or self._ended_for is None:  # of an end in peace it is no reason of its own
            self._ended_for = change
        if change.cause is None:
            attempt.kill()
            return ending_ns
        if change.cause is Cause.FINISHED:
            return ending_ns
        if change.cause >= Cause.FAILED:
            # Who was asked to end together with the others can't any more.
            return ending_ns if attempt.is_rescuing else self._release_survivors(attempt)
        return self._ask_to_save(attempt, change, ending_ns)

    def _ask_to_save(self, attempt: Attempt, change: Change, ending_ns: int) -> int:
        deadline_s = self._limits.grace_s if change.deadline_s is None else change.deadline_s
        deadline = self._fx.now_ns() + int(deadline_s * 1e9)
        if self._stop is None:
            self._ask(attempt, StopMode.SAVE if change.save else StopMode.NO_SAVE, deadline)
        return min(deadline, ending_ns or deadline)

    def _end_at_once(self) -> None:
        super()._end_at_once()
        self._waits_no_more = True

    def _begin_stop(self, request: StopRequest) -> None:
        super()._begin_stop(request)
        rendezvous = self._rendezvous_of_nodes
        # An order in the run folder is for the job; whatever else asks a guest to stop means the guest.
        self.leaves = not rendezvous.is_member or (request.source != "command" and rendezvous.leave())
        if not self.leaves:
            rendezvous.ask_stop(request.note(self._fx.now_ns()))

    def _report(self, attempt: Attempt) -> Report:
        codes = attempt.codes
        self._own_failures = failures = attempt.failures()
        if failures and (self._ended_for is None or self._ended_for.cause in (Cause.FINISHED, Cause.FAILED)):
            cause = Cause.FAILED
        elif failures and self._has_ended_in_discord(attempt):
            cause, failures = Cause.FAILED, []
        elif self._stop is not None:
            cause = Cause.STOP
        elif all(code == 0 for code in codes.values()):
            cause = Cause.FINISHED
        elif self._ended_for is not None and self._ended_for.cause is not None:
            cause = self._ended_for.cause
        else:
            cause = Cause.STOP if 75 in codes.values() else Cause.LOST
        # Secondary failures after a loss are its echo: nothing to judge by. Of the others, the first one can count.
        told = [root_cause(failures)] if cause is Cause.FAILED and failures else []
        return Report(
            cause=cause,
            codes=codes,
            reached_step=attempt.highest_step,
            saved=attempt.has_saved,
            is_end_unsaved=attempt.is_end_unsaved,
            failures=[asdict(failure) for failure in told],
        )

    def _has_ended_in_discord(self, attempt: Attempt) -> bool:
        """Whether an end in peace has failed: the other nodes' workers must not wait for it to come about.

        It spends no restart: that the nodes meet anew was decided before.
        """
        return attempt.is_rescuing and self._ended_for is not None and self._ended_for.cause in PEACEFUL

    # leading

    def _judge_round(self, gathered: Gathered) -> Verdict:
        verdict = self._lead_round(gathered)
        if verdict.goes_on:
            return verdict
        tally = self._take_tally()
        return verdict if tally is None else replace(verdict, facts={**verdict.facts, "tally": asdict(tally)})

    def _lead_round(self, gathered: Gathered) -> Verdict:
        facts = gathered.facts
        history = History(tuple(Failure(**failure) for failure in facts.get("history", ())))
        restarts = int(facts.get("restarts", 0))
        attempt = int(facts.get("attempt", -1)) + 1
        self._fx = replace(self._fx, ledger=self._unbound.bind(generation=gathered.generation))
        if gathered.previous and self._all_finished(gathered):
            is_unsaved = any(report.is_end_unsaved for report in gathered.reports)
            status = Status.STORAGE if is_unsaved else Status.FINISHED
            return Verdict(goes_on=False, status=int(status), facts={"why": "finished"})
        # A guest that is all that is left goes on with what others have begun.
        begins = len(gathered.gone) == len(gathered.previous) and not (facts and self._rendezvous_of_nodes.is_guest)
        if not begins:
            self._take_over(facts)
        if gathered.note or gathered.cause is Cause.STOP or any(one.cause is Cause.STOP for one in gathered.reports):
            has_trained = begins or any(report.reached_step for report in gathered.reports)
            return self._conclude(gathered, gathered.note, () if has_trained else self._resume)
        # The wish is that of whoever began the job, or goes on with it after all have died; who joins them has none.
        if begins:
            self._wish, self._began = self._settle(gathered.generation), gathered.generation
        resume = self.choose_resume()
        if resume is None:
            return self._conclude_own_stop(gathered, () if begins else self._resume)
        told: dict[str, Any] | None = None
        failures = [_failure(one) for report in gathered.reports for one in report.failures]
        if failures and not gathered.gone:
            history, told = self._weigh(history, failures, gathered, resume)
            if told["gives_up"]:
                return Verdict(goes_on=False, status=int(Status.FAILED), facts={"why": "failed", "failure": told})
            restarts += 1
            if not self._wait_backoff(Restart(**told["decision"])):
                return self._conclude_own_stop(gathered, resume, failure=told)
        self._write_round(gathered, resume)
        return Verdict(
            goes_on=True,
            facts={
                "wish": asdict(self._wish),
                "began": self._began,
                "resume": [asdict(point) for point in resume],
                "attempt": attempt,
                "restarts": restarts,
                "history": [asdict(failure) for failure in history.failures],
                "failure": told,
            },
        )

    def _all_finished(self, gathered: Gathered) -> bool:
        finished = [report for report in gathered.reports if all(code == 0 for code in report.codes.values())]
        return not gathered.gone and len(finished) == len(gathered.previous)

    def _conclude_own_stop(
        self, gathered: Gathered, stands: Sequence[ResumePoint], *, failure: Mapping[str, Any] | None = None
    ) -> Verdict:
        """This node was told to stop while it led: the job does, unless only this node leaves."""
        assert self._stop is not None
        if self.leaves:
            raise StoppedWaiting
        return self._conclude(gathered, self._stop.note(self._fx.now_ns()), stands, failure=failure)

    def _conclude(
        self,
        gathered: Gathered,
        note: Mapping[str, Any],
        stands: Sequence[ResumePoint],
        *,
        failure: Mapping[str, Any] | None = None,
    ) -> Verdict:
        """The job stops; `stands` is where it would have gone on from, had nothing been trained since."""
        is_safe = any(report.saved for report in gathered.reports) or self._are_new(stands)
        saved = is_safe and bool(note.get("save", True))
        by_hand = note.get("signal") == signal.SIGINT
        status = Status.SAVED if saved else Status.INTERRUPTED if by_hand else Status.TERMINATED
        facts = {"why": str(note.get("why", "stopped")), "failure": failure}
        return Verdict(goes_on=False, status=int(status), facts=facts)

    def _weigh(
        self,
        history: History,
        failures: Sequence[WorkerFailure],
        gathered: Gathered,
        resume: Sequence[ResumePoint],
    ) -> tuple[History, dict[str, Any]]:
        root = root_cause(failures)
        reached = max(report.reached_step for report in gathered.reports)
        durable = max((point.step for point in resume), default=0)
        history = history.after(
            Failure(
                cause=root.cause,
                reached_step=reached,
                durable_step=durable,
                is_mistake=root.is_mistake and not gathered.facts.get("restarts") and not resume,
            )
        )
        decision = decide(history, self._policy, self._fx.draw())
        gives_up = isinstance(decision, GiveUp)
        self._fx.ledger.write(
            "decision",
            action="give_up" if gives_up else "restart",
            cause=root.cause,
            rank=root.rank,
            **asdict(decision),
        )
        told = {
            "root": asdict(root),
            "decision": asdict(decision),
            "gives_up": gives_up,
            "reached": reached,
            "resume": durable,
        }
        return history, told

    def _write_round(self, gathered: Gathered, resume: Sequence[ResumePoint]) -> None:
        joined = [name for name in gathered.members if name not in gathered.previous]
        self._fx.ledger.write(
            "membership",
            change="round",
            cause=gathered.cause.name.lower(),
            nodes=list(gathered.members),
            joined=joined,
            lost=list(gathered.gone),
        )
        if gathered.reports:
            begin = max((point.step for point in resume), default=0)
            end = max(begin, *(report.reached_step for report in gathered.reports))
            self._fx.ledger.write("steps_repeated", from_step=begin, to_step=end, steps=end - begin)


def point_exists(point: ResumePoint) -> bool:
    """Whether this node sees the checkpoint."""
    from pathlib import Path

    return Path(point.path).exists()


def _failure(record: Mapping[str, Any]) -> WorkerFailure:
    return WorkerFailure(**{**record, "bases": tuple(record["bases"])})
