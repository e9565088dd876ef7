"""One attempt: this node's workers from their fork to the last exit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from elastic_fit.launch.nursery import BOARD_DESCRIPTOR
from elastic_fit.launch.streams import Route, Streams
from elastic_fit.launch.workers import Exit, Nursery, NurseryLost, bootstrap_command
from elastic_fit.supervisor.board import Board, Phase, StopMode, Word
from elastic_fit.supervisor.exits import Exit as Status
from elastic_fit.supervisor.policy import WorkerFailure
from elastic_fit.supervisor.watch import signal_name

BOARD_PATH = f"/proc/self/fd/{BOARD_DESCRIPTOR}"

MESSAGE_LIMIT = 4 << 10
"""Characters of a failed worker's message that are told on, to the ledger and to other nodes. The log has them all."""
LINE_LIMIT = 1 << 10
"""Of a line of its traceback: the last one is the message again."""
TRACEBACK_LIMIT = 16 << 10
"""Of its traceback, the last ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What one worker is started with."""

    local_rank: int
    rank: int
    environment: Mapping[str, str]
    args: Sequence[str]
    stdout: Route
    stderr: Route
    error_file: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What the workers run."""

    kind: str
    """``script``, ``module`` or ``command`` (``--no-python``)."""
    target: str
    cwd: str
    fresh_interpreter: bool = False
    """Execute a new interpreter instead of running in the forked process."""

    def command(self, args: Sequence[str]) -> list[str]:
        """The command line to execute, or an empty list to run inside the fork."""
        if self.kind == "command":
            return [self.target, *args]
        if self.fresh_interpreter:
            return bootstrap_command((self.kind, self.target, args))
        return []


@dataclass(slots=True)
class _Worker:
    plan: WorkerPlan
    board: Board
    pid: int
    exit: Exit | None = None
    is_sent_away: bool = False
    """Whether the agent has sent it SIGTERM: what that leaves on its board is nobody's wish."""


class Attempt:
    """This node's workers in one attempt.

    Args:
        number: the attempt, from 0.
        nursery: where workers come from.
        program: what they run.
        now_ns: CLOCK_MONOTONIC.
    """

    def __init__(self, number: int, nursery: Nursery, program: Program, now_ns: Callable[[], int]) -> None:
        self.number = number
        self.started_ns = 0
        self.first_exit_ns = 0
        self._nursery = nursery
        self._program = program
        self._now_ns = now_ns
        self._workers: dict[int, _Worker] = {}
        self._streams = Streams()
        self._is_rescuing = False
        self._is_told_to_stop = False

    def start(self, plans: Sequence[WorkerPlan]) -> None:
        """Fork all workers. Raises NurseryLost and ElasticFitError as `Nursery.spawn` does."""
        self.started_ns = self._now_ns()
        try:
            for plan in plans:
                self._start_one(plan)
        finally:
            self._streams.start()

    def _start_one(self, plan: WorkerPlan) -> None:
        board, board_descriptor = Board.anonymous()
        descriptors = (self._streams.open(plan.stdout), self._streams.open(plan.stderr), board_descriptor)
        try:
            pid = self._nursery.spawn(
                plan.local_rank,
                env=plan.environment,
                cwd=self._program.cwd,
                job=(self._program.kind, self._program.target, plan.args),
                command=self._program.command(plan.args),
                descriptors=descriptors,
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._workers[pid] = _Worker(plan=plan, board=board, pid=pid)

    # what is known

    @property
    def pids(self) -> dict[int, int]:
        """Pid by global rank."""
        return {worker.plan.rank: worker.pid for worker in self._workers.values()}

    @property
    def running(self) -> list[int]:
        """Pids of the workers that have not ended."""
        return [worker.pid for worker in self._workers.values() if worker.exit is None]

    @property
    def boards(self) -> list[Board]:
        """All workers' boards, the ended ones' too."""
        return [worker.board for worker in self._workers.values()]

    @property
    def running_boards(self) -> list[tuple[int, Board]]:
        """Rank and board of the workers that have not ended, of those that may tell of somebody's signal."""
        running = (worker for worker in self._workers.values() if worker.exit is None)
        return [(worker.plan.rank, worker.board) for worker in running if not worker.is_sent_away]

    def board_of(self, pid: int) -> Board:
        """The board of one worker."""
        return self._workers[pid].board

    @property
    def codes(self) -> dict[int, int]:
        """Exit status by global rank, of the workers that have ended."""
        return {worker.plan.rank: worker.exit.code for worker in self._workers.values() if worker.exit}

    @property
    def highest_step(self) -> int:
        """The highest optimizer step that a worker of this node has completed."""
        return max((board[Word.STEP] for board in self.boards), default=0)

    @property
    def has_trained(self) -> bool:
        """Whether every worker has completed a step in this attempt."""
        return bool(self._workers) and all(board[Word.FIRST_STEP_NS] for board in self.boards)

    def failures(self) -> list[WorkerFailure]:
        """The workers that ended other than well, with what they left behind about it."""
        return [
            _read_failure(worker)
            for worker in self._workers.values()
            if worker.exit is not None and not self._has_ended_well(worker)
        ]

    @property
    def has_crashed(self) -> bool:
        """Whether a worker has ended badly that was not sent away."""
        ended = [worker for worker in self._workers.values() if worker.exit is not None]
        return any(not worker.is_sent_away and not self._has_ended_well(worker) for worker in ended)

    @property
    def has_stopped(self) -> bool:
        """Whether a worker has left as one does that has saved and stops."""
        return any(
            worker.exit is not None and worker.exit.code == Status.SAVED and self._has_ended_well(worker)
            for worker in self._workers.values()
        )

    def _has_ended_well(self, worker: _Worker) -> bool:
        code = worker.exit.code if worker.exit is not None else None
        if code == Status.SAVED:
            # Of a script that nobody has asked to stop, and that has saved nothing, it says nothing.
            was_asked = self._is_told_to_stop or bool(worker.board[Word.SIGNALLED])
            return was_asked or any(board[Word.SAVED_STEP] for board in self.boards)
        # To leave with nothing to save is no failure where a stop was asked for.
        return code == Status.FINISHED or (code == Status.TERMINATED and self._is_told_to_stop)

    # what is done

    def collect(self) -> list[Exit]:
        """Exits since the last call; a lost nursery counts as the death of all."""
        try:
            exits = self._nursery.news()
        except NurseryLost:
            now = self._now_ns()
            exits = [Exit(self._workers[pid].plan.local_rank, pid, -signal.SIGKILL, now) for pid in self.running]
            self._nursery.restart()
        mine = [exit_ for exit_ in exits if exit_.pid in self._workers]
        for exit_ in mine:
            worker = self._workers[exit_.pid]
            worker.exit = exit_
            if not self._has_ended_well(worker) and not self.first_exit_ns:
                self.first_exit_ns = exit_.seen_ns
        return mine

    def rank_of(self, pid: int) -> int:
        """Global rank of a worker."""
        return self._workers[pid].plan.rank

    @property
    def is_rescuing(self) -> bool:
        """Whether the workers were told that a peer is gone."""
        return self._is_rescuing

    def ask(self, request: int, mode: StopMode, deadline_ns: int) -> None:
        """Put the stop word on the boards of the running workers.

        A worker that has not come as far as a process group can't read it, and has nothing to save: it gets SIGTERM.
        Survivors of a death keep their order to save what they hold and leave: with whom it was they can agree on
        nothing any more.
        """
        if self._is_rescuing:
            return
        self._is_rescuing = mode is StopMode.RESCUE
        if mode in (StopMode.SAVE, StopMode.NO_SAVE):
            self._is_told_to_stop = True
        for pid in self.running:
            board = self.board_of(pid)
            board.ask(request, mode, deadline_ns)
            if board.phase < Phase.PROCESS_GROUP:
                self._workers[pid].is_sent_away = not board[Word.SIGNALLED]
                self.signal(pid, signal.SIGTERM)

    def signal(self, pid: int, number: int) -> None:
        """Signal one worker."""
        try:
            self._nursery.signal(pid, number)
        except NurseryLost:
            return  # they died with it; `collect` will say so

    def kill(self) -> None:
        """SIGKILL every worker that is left, with its process group."""
        for pid in self.running:
            try:
                self._nursery.signal(pid, signal.SIGKILL, group=True)
            except NurseryLost:
                return

    def is_saving(self) -> bool:
        """Whether a running worker is writing a checkpoint or rescuing the state."""
        return any(self.board_of(pid).phase in (Phase.SAVING, Phase.RESCUING) for pid in self.running)

    def dump_stacks(self) -> list[int]:
        """Have the workers that are left, and can, write all their threads' stacks to their logs; returns the ranks."""
        able = [pid for pid in self.running if self.board_of(pid).phase >= Phase.SCRIPT]
        for pid in able:
            self.signal(pid, signal.SIGQUIT)
        return [self.rank_of(pid) for pid in able]

    @property
    def rescued_step(self) -> int:
        """The step of the newest state that a worker of this node has rescued; 0 where none has."""
        return max((board[Word.RESCUED_STEP] for board in self.boards), default=0)

    @property
    def has_saved(self) -> bool:
        """Whether its end is saved: by a stop, by a survivor, or before anybody failed."""
        saved = max((board[Word.SAVED_STEP] for board in self.boards), default=0)
        return self.has_stopped or bool(self.rescued_step) or 0 < saved >= self.highest_step

    @property
    def is_end_unsaved(self) -> bool:
        """Whether a training has ended whose end a worker of this node could not save."""
        return any(board[Word.END_UNSAVED] for board in self.boards)

    def listens(self) -> bool:
        """Whether a running worker can read the stop word."""
        return any(self.board_of(pid).phase >= Phase.PROCESS_GROUP for pid in self.running)

    @property
    def is_parted(self) -> bool:
        """Whether a worker, told to stop, has left by itself, and another one waits for it in a trainer."""
        has_left = any(worker.exit and worker.board[Word.LEFT_EARLY] for worker in self._workers.values())
        return has_left and any(Phase.PROCESS_GROUP <= self.board_of(pid).phase < Phase.DONE for pid in self.running)

    def finish(self) -> None:
        """All have ended: take the last of their output and let the boards go."""
        self._streams.finish()
        for worker in self._workers.values():
            worker.board.close()
        self._workers = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _ErrorFile:
    type: str | None = None
    bases: tuple[str, ...] = ()
    message: str = ""
    traceback: str = ""
    printed: bool = False
    t: float = 0.0

    @classmethod
    def read(cls, path: Path) -> _ErrorFile:
        try:
            record = json.loads(path.read_text())
            told = record["message"]
            if isinstance(told, str):
                return cls(message=_shortened(told, MESSAGE_LIMIT))
            trace = str(record.get("traceback") or told.get("extraInfo", {}).get("py_callstack", ""))
            lines = (_shortened(line, LINE_LIMIT) for line in trace.split("\n"))
            return cls(
                type=record.get("type"),
                bases=tuple(record.get("bases", ())),
                message=_shortened(str(told["message"]), MESSAGE_LIMIT),
                traceback="\n".join(lines)[-TRACEBACK_LIMIT:],
                printed=record.get("printed") is True,
                t=float(record.get("t", 0.0)),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()


def _shortened(text: str, limit: int) -> str:
    more = len(text) - limit
    return text if more <= 0 else f"{text[:limit]} ... ({more} more characters in the worker's log)"


def _read_failure(worker: _Worker) -> WorkerFailure:
    assert worker.exit is not None
    told = _ErrorFile.read(worker.plan.error_file)
    code = worker.exit.code
    failure = WorkerFailure(
        rank=worker.plan.rank,
        pid=worker.pid,
        code=code,
        seen_ns=worker.exit.seen_ns,
        step=worker.board[Word.STEP],
        trained=bool(worker.board[Word.FIRST_STEP_NS]),
        signal=signal_name(code) if code < 0 else None,
    )
    if failure.signal and not told.message:
        return failure
    return replace(
        failure,
        type=told.type,
        bases=told.bases,
        message=told.message,
        traceback=told.traceback,
        shown=told.printed and worker.plan.stderr.console is not None,
        t=told.t,
    )
