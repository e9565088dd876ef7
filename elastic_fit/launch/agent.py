"""The agent: supervises one node's workers, attempt after attempt, until the run ends.

The loop sleeps in one ``select`` over the nursery's socket, the signal latch and a timer; it hears of a worker's death
as soon as the kernel tells the nursery. Decisions are the pure functions of `elastic_fit.supervisor.policy`.
"""

from __future__ import annotations

import contextlib
import select
import signal
from collections.abc import Sequence
from dataclasses import replace

from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec

from elastic_fit.launch._torchelastic import Result, TorchelasticAgent
from elastic_fit.launch.attempt import Attempt, Program
from elastic_fit.launch.effects import Effects, Limits
from elastic_fit.launch.recovery import Recovery, seconds
from elastic_fit.launch.stopping import Ears
from elastic_fit.supervisor.board import StopMode, Word
from elastic_fit.supervisor.context import ResumePoint
from elastic_fit.supervisor.exits import Exit as Status
from elastic_fit.supervisor.frozen import FrozenWatch
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
from elastic_fit.supervisor.stop import Answer, StopRequest, answer
from elastic_fit.supervisor.store import LeftOff
from elastic_fit.supervisor.watch import signal_name
from elastic_fit.supervisor.wish import NO_WISH, Wish

IDLE_S = 0.25
"""Longest sleep of the loop while all is well."""
STARTING_S = 0.02
"""Longest sleep until the first step of an attempt is seen."""
RESCUE_PATIENCE_S = 10.0
"""How long survivors may take to leave their collectives once a peer is gone, unless they are writing a checkpoint."""
DUMP_S = 0.3
"""Between the order to write down their stacks and the end of the workers that are late."""


class ElasticAgent(TorchelasticAgent):
    """Runs the job on this node.

    After `run` returns, `status` is the exit status of the command and `summary` what there is to say about it.

    Args:
        wish: which checkpoint the run goes on from until it has saved one of its own.
        began: the generation of this command: what was saved under it or a later one is new.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        program: Program,
        effects: Effects,
        *,
        policy: RestartPolicy,
        limits: Limits,
        wish: Wish = NO_WISH,
        began: int = 0,
    ) -> None:
        super().__init__(spec)
        self._wish = wish
        self._began = began
        self.status = Status.FAILED
        self.restarts = 0
        self.reached_step = 0
        self._program = program
        self._fx = effects
        self._policy = policy
        self._limits = limits
        self._history = History()
        self._attempt: Attempt | None = None
        self._stop: StopRequest | None = None
        self._ears = Ears(
            effects.latch,
            limits.grace_s,
            orders=effects.stop_orders,
            file=effects.stop_file,
            now_ns=effects.now_ns,
        )
        self._dumped_ns = 0
        self._recovery = Recovery()
        self._requests = 0
        self._has_saved = False
        self._resume: tuple[ResumePoint, ...] = ()

    # the life of the job

    def supervise(self) -> Result:
        """Run attempts until one ends the run."""
        for number in range(1 << 31):
            attempt = self._begin(number)
            if attempt is None:
                return self._ended_by_stop()
            self._follow(attempt)
            failures = attempt.failures()
            if self._stop is not None or attempt.has_stopped:
                return self._conclude_stop(attempt)
            if not failures:
                return self._finished(attempt)
            restart = self._judge(attempt, failures)
            if self._stop is not None or (restart and not self._wait_backoff(restart)):
                return self._ended_by_stop()
            if not restart:
                return Result(succeeded=False)
        raise AssertionError("unreachable")

    def _begin(self, number: int) -> Attempt | None:
        """Choose the resume point, meet the other nodes, fork the workers; None where a stop came first."""
        fx = self._fx
        self._wait_for_nursery()
        if self._stop is not None:
            return None
        started = fx.now_ns()
        points = self.choose_resume()
        if points is None:
            return None
        self._resume = points
        return self._fork(number, self.form(number), started)

    def choose_resume(self) -> tuple[ResumePoint, ...] | None:
        """The points to go on from; None where a stop has come before, or while checkpoints were read."""
        while self._stop is None:
            with contextlib.suppress(LeftOff):
                return self._fx.select_resume(self._wish, self._ears.has_news)
            self._note_signals()
        return None

    def _wait_for_nursery(self) -> None:
        """Until it can fork workers, or a stop has come first."""
        self._note_signals()
        while self._stop is None and not self._fx.nursery.is_ready():
            select.select([self._fx.nursery.fileno(), self._ears.fileno()], [], [], IDLE_S)
            self._note_signals()

    def _fork(self, number: int, group: WorkerGroup, started: int) -> Attempt:
        """The nodes have met: fork this node's workers."""
        fx = self._fx
        self._recovery.met_ns = fx.now_ns()
        fx.ledger.write(
            "rendezvous",
            attempt=number,
            nodes=group.group_world_size,
            world_size=group.workers[0].world_size,
            seconds=seconds(started, self._recovery.met_ns),
        )
        attempt = Attempt(number, fx.nursery, self._program, fx.now_ns)
        self._attempt, self._dumped_ns = attempt, 0
        plans = [
            fx.plan(worker, number, self.worker_environment(worker, number), self._resume) for worker in group.workers
        ]
        attempt.start(plans)
        self._recovery.forked_ns = fx.now_ns()
        fx.ledger.write(
            "workers_started",
            attempt=number,
            pids=attempt.pids,
            seconds=seconds(attempt.started_ns, self._recovery.forked_ns),
            warm=fx.nursery.warm,
        )
        return attempt

    def _follow(self, attempt: Attempt) -> None:
        """Watch until all workers have ended."""
        told_of_start = False
        ending_ns = 0
        watch = FrozenWatch()
        while attempt.running:
            self._sleep(attempt, told_of_start, ending_ns)
            self._note_signals()
            self._end_frozen(attempt, watch)
            self._note_exits(attempt)
            if not told_of_start and not ending_ns and attempt.has_trained:
                told_of_start = True
                self._note_start(attempt)
            if self._is_left_waiting(attempt, ending_ns):
                ending_ns = self._release_survivors(attempt)
            ending_ns = self._note_others(attempt, ending_ns)
            is_late = self._stop is not None and self._fx.now_ns() >= self._stop.deadline_ns
            if is_late or (ending_ns and self._is_over(attempt, ending_ns)):
                self._end_stragglers(attempt)
        self._recovery.ended_ns = self._fx.now_ns()
        self.reached_step = max(self.reached_step, attempt.highest_step)
        # One that has done no step stands where it began.
        self._has_saved = attempt.has_saved or (not attempt.highest_step and self._are_new(self._resume))

    def _sleep(self, attempt: Attempt, told_of_start: bool, ending_ns: int) -> None:
        timeout = IDLE_S if told_of_start else STARTING_S
        for deadline in (ending_ns, self._stop.deadline_ns if self._stop else 0):
            if deadline:
                timeout = min(timeout, max(0.01, (deadline - self._fx.now_ns()) / 1e9))
        select.select([self._fx.nursery.fileno(), self._ears.fileno(), *self._others()], [], [], timeout)

    def _others(self) -> list[int]:
        """Descriptors that are readable when there is news of other nodes."""
        return []

    def _note_others(self, attempt: Attempt, ending_ns: int) -> int:
        """Hear of other nodes, and act on it; returns when the workers' time is up, 0 while they are to train."""
        return ending_ns

    # signals and stops

    def _note_signals(self) -> None:
        boards = self._attempt.running_boards if self._attempt is not None and self._stop is None else ()
        for request in self._ears.hear(boards):
            reply = answer(self._stop, request)
            if reply is Answer.BEGIN:
                self._begin_stop(request)
            elif reply is Answer.AT_ONCE:
                self._note_more("stop_insisted", request)
                self._end_at_once()
            else:
                self._fx.observer.asked_again(request, self._note_more("stop_repeated", request))

    def _end_at_once(self) -> None:
        """A person insists."""
        self.end_workers()

    def _begin_stop(self, request: StopRequest) -> None:
        left_s = self._fx.seconds_left()
        if left_s is not None and left_s < request.grace_s:
            request = replace(request, grace_s=left_s)
        self._stop = request
        self._fx.ledger.write(
            "stop_requested",
            source=request.source,
            reason=request.reason,
            deadline_s=request.grace_s,
            save=request.save,
            rank=request.rank,
            id=request.id,
        )
        self._fx.observer.stopping(request)
        if self._attempt is not None:
            self._ask(self._attempt, request.mode, request.deadline_ns)

    def _note_more(self, event: str, request: StopRequest) -> float:
        """Somebody asks once more; returns how many seconds the stop may still take."""
        assert self._stop is not None
        left_s = max(0.0, seconds(self._fx.now_ns(), self._stop.deadline_ns))
        told = {"source": request.source, "reason": request.reason, "rank": request.rank, "id": request.id}
        self._fx.ledger.write(event, deadline_s=left_s, **told)
        return left_s

    def _ask(self, attempt: Attempt, mode: StopMode, deadline_ns: int) -> None:
        self._requests += 1
        attempt.ask(self._requests, mode, deadline_ns)

    def _end_stragglers(self, attempt: Attempt) -> None:
        """The time is up: have those that are left write down where they are, then kill them."""
        now = self._fx.now_ns()
        if not self._dumped_ns:
            self._dumped_ns = now
            self._fx.ledger.write("stragglers", attempt=attempt.number, ranks=attempt.dump_stacks())
        elif now - self._dumped_ns >= DUMP_S * 1e9:
            attempt.kill()

    def _conclude_stop(self, attempt: Attempt) -> Result:
        codes = attempt.codes.values()
        if codes and all(code == 0 for code in codes):
            return self._finished(attempt)
        attempt.finish()
        return self._ended_by_stop()

    def _are_new(self, points: Sequence[ResumePoint]) -> bool:
        """Whether this command has saved some of what a start goes on from."""
        return any(point.generation >= self._began and point.path != self._wish.path for point in points)

    def _ended_by_stop(self) -> Result:
        saved = self._has_saved and (self._stop is None or self._stop.save)
        unsaved = self._stop.unsaved if self._stop is not None else Status.TERMINATED
        self.status = Status.SAVED if saved else unsaved
        self._fx.ledger.write("stopped", code=int(self.status), saved=saved, missing=self.missing())
        return Result(succeeded=False, stopped=True)

    def missing(self) -> list[str]:
        """Names of the nodes that the job has lost and not yet gone on without."""
        return []

    def forget_orders(self) -> None:
        """The run has ended: what asked it to stop must not stop the next one."""
        self._ears.forget()

    # exits and failures

    def _end_frozen(self, attempt: Attempt, watch: FrozenWatch) -> None:
        for pid in watch.frozen(attempt.running, self._fx.now_ns() / 1e9):
            rank = attempt.rank_of(pid)
            self._fx.ledger.write(
                "frozen", attempt=attempt.number, rank=rank, pid=pid, step=attempt.board_of(pid)[Word.STEP]
            )
            self._fx.observer.frozen(rank, pid)
            attempt.signal(pid, signal.SIGKILL)

    def _note_exits(self, attempt: Attempt) -> None:
        for exit_ in attempt.collect():
            self._fx.ledger.write(
                "worker_exit",
                attempt=attempt.number,
                rank=attempt.rank_of(exit_.pid),
                local_rank=exit_.local_rank,
                pid=exit_.pid,
                code=exit_.code,
                signal=signal_name(exit_.code) if exit_.code < 0 else None,
                step=attempt.board_of(exit_.pid)[Word.STEP],
                noticed_s=seconds(exit_.seen_ns, self._fx.now_ns()),
            )

    def _is_left_waiting(self, attempt: Attempt, ending_ns: int) -> bool:
        """Whether workers may wait for one that is gone, and nobody has told them yet."""
        if attempt.is_rescuing:
            return False
        # In an end in peace those that could save nothing yet were sent away.
        has_failed = attempt.has_crashed if ending_ns else bool(attempt.first_exit_ns)
        return has_failed or attempt.is_parted

    def _release_survivors(self, attempt: Attempt) -> int:
        """A worker is gone: ask the others to save what they hold and leave. Returns their deadline."""
        now = self._fx.now_ns()
        self._recovery.begin(attempt.first_exit_ns or now, now)
        patience = RESCUE_PATIENCE_S if attempt.listens() else self._limits.shutdown_s
        deadline = now + int(patience * 1e9)
        self._ask(attempt, StopMode.RESCUE, deadline)
        return deadline

    def _is_over(self, attempt: Attempt, ending_ns: int) -> bool:
        """Whether the survivors' time is up; who is writing a checkpoint has until the grace ends."""
        late = self._fx.now_ns() - ending_ns
        return late >= (int(self._limits.grace_s * 1e9) if attempt.is_saving() else 0)

    def _judge(self, attempt: Attempt, failures: Sequence[WorkerFailure]) -> Restart | None:
        """Decide what to do about a failure, and tell; None where the run ends, or a stop comes before that."""
        fx = self._fx
        root = root_cause(failures)
        reached = max(attempt.highest_step, max((point.step for point in self._resume), default=0))
        was_resumed = bool(self._resume)
        attempt.finish()
        points = self.choose_resume()
        if points is None:
            # What nobody got round to reading counts as saved: the next start verifies it.
            self._has_saved = self._has_saved or self._are_new(self._resume)
            return None
        self._resume, self._has_saved = points, self._are_new(points)
        resume = max((point.step for point in self._resume), default=0)
        failure = Failure(
            cause=root.cause,
            reached_step=reached,
            durable_step=resume,
            is_mistake=root.is_mistake and not self.restarts and not was_resumed,
        )
        self._history = self._history.after(failure)
        decision = decide(self._history, self._policy, fx.draw())
        fx.ledger.write("teardown", attempt=attempt.number, seconds=self._recovery.teardown_s)
        fx.ledger.write(
            "decision",
            attempt=attempt.number,
            action="restart" if isinstance(decision, Restart) else "give_up",
            why=decision.why,
            cause=root.cause,
            rank=root.rank,
            backoff_s=decision.backoff_s if isinstance(decision, Restart) else None,
            budget_left=decision.budget_left if isinstance(decision, Restart) else 0,
        )
        fx.observer.failed(root, decision, reached=reached, resume=resume)
        self.status = Status.FAILED
        if isinstance(decision, GiveUp):
            return None
        self.restarts += 1
        fx.ledger.write("steps_repeated", from_step=resume, to_step=reached, steps=max(0, reached - resume))
        return decision

    def _wait_backoff(self, restart: Restart) -> bool:
        """Wait before the next attempt; False where a stop came meanwhile."""
        until = self._fx.now_ns() + int(restart.backoff_s * 1e9)
        while self._stop is None and (left := until - self._fx.now_ns()) > 0:
            select.select([self._ears.fileno()], [], [], min(IDLE_S, left / 1e9))
            self._note_signals()
        return self._stop is None

    def _note_start(self, attempt: Attempt) -> None:
        """Every worker has done its first step: after a failure, say what it took to get here."""
        boards = attempt.boards
        self._fx.ledger.write("training", attempt=attempt.number, step=min(board[Word.STEP] for board in boards))
        if not self._recovery.is_under_way:
            return
        took = self._recovery.finish(boards)
        self._fx.ledger.write("recovered", attempt=attempt.number, **took)
        self._fx.observer.recovered(took["total_s"], min(board[Word.STEP] for board in boards))

    def _finished(self, attempt: Attempt) -> Result:
        # Who reads 0 takes the trained model to be there.
        self.status = Status.STORAGE if attempt.is_end_unsaved else Status.FINISHED
        attempt.finish()
        self.wait_for_other_nodes()
        return Result(succeeded=True)

    def end_workers(self) -> None:
        """End what is left, at once."""
        if self._attempt is not None:
            self._attempt.kill()
