"""One stop request for the whole job: who asked, why, until when, and whether to save. Pure.

Everybody who may ask (a signal to the launcher of any node or to one worker, the command, a file, a notice, another
node) makes a `StopRequest`; the first one counts, and the job has one deadline. What is done about it in the workers
is agreed on in `elastic_fit.supervisor.agreement`; here is only what it means.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from elastic_fit.supervisor.board import NOTICED, StopMode
from elastic_fit.supervisor.exits import Exit

SLACK = 1.25
"""A save may take so many times as long as the slowest of the last ones did."""
LEAST_MARGIN_S = 0.2
"""What is left for the way out, beyond the save itself."""


def unsaved_after(number: int) -> Exit:
    """The exit status where nothing new was saved after that signal; 0 where none has asked."""
    return Exit.INTERRUPTED if number == signal.SIGINT else Exit.TERMINATED


def asker(number: int) -> str:
    """In words, what has asked a worker to stop, by its board's `Word.SIGNALLED`; empty where nothing has."""
    if number == NOTICED:
        return "a notice"
    return signal.Signals(number).name if number else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    """Somebody asks the job to stop."""

    source: str
    """``signal`` (to the launcher), ``worker`` (a signal to one of its workers), ``command``, ``file``, ``notice``
    (a callable of the user's) or ``node`` (it was asked of another node)."""
    reason: str
    """In a few words: the signal's name, who ran the command, the path of the file."""
    asked_ns: int
    """When, CLOCK_MONOTONIC of this node."""
    grace_s: float
    """How long the stop may take, from then to the last exit."""
    save: bool = True
    """Save before leaving."""
    signal: int = 0
    """The signal that asked, if one did."""
    rank: int | None = None
    """The worker that was asked, if it was one."""
    insists: bool = False
    """Whether this is a Ctrl-C after another one, whatever has begun the stop."""
    id: str = ""
    """By which whoever asked finds the answer in the ledger."""

    @property
    def deadline_ns(self) -> int:
        """When nothing of the job is left, CLOCK_MONOTONIC of this node."""
        return self.asked_ns + int(self.grace_s * 1e9)

    @property
    def is_interrupt(self) -> bool:
        """Whether a person has pressed Ctrl-C at the launcher."""
        return self.source == "signal" and self.signal == signal.SIGINT

    @property
    def mode(self) -> StopMode:
        """What the workers are told."""
        return StopMode.SAVE if self.save else StopMode.NO_SAVE

    @property
    def unsaved(self) -> Exit:
        """The exit status where nothing new was saved."""
        return unsaved_after(self.signal)

    def note(self, now_ns: int) -> dict[str, Any]:
        """For the other nodes: what they need to do the same, as JSON. Clocks differ, so it says what is left."""
        return {
            "why": f"{self.reason} ({self.source})",
            "deadline_s": max(0.0, (self.deadline_ns - now_ns) / 1e9),
            "save": self.save,
            "signal": self.signal,
        }

    @classmethod
    def from_note(cls, note: Mapping[str, Any], now_ns: int, grace_s: float) -> StopRequest:
        """What another node's note asks of this one; `grace_s` where it doesn't say."""
        return cls(
            source="node",
            reason=str(note.get("why", "another node stops")),
            asked_ns=now_ns,
            grace_s=float(note.get("deadline_s", grace_s)),
            save=bool(note.get("save", True)),
            signal=int(note.get("signal", 0)),
        )


class Answer(Enum):
    """What a request changes."""

    BEGIN = "begin"
    """The job stops."""
    KEEP = "keep"
    """It is stopping already: neither the deadline nor what is done about it changes."""
    AT_ONCE = "at once"
    """A person insists: end the workers now."""


def answer(under_way: StopRequest | None, new: StopRequest) -> Answer:
    """What `new` changes where `under_way` is the stop that the job is in, if it is in one.

    Only who insists gets more than a stop: schedulers repeat their signals, and none of them means "now".
    """
    if under_way is None:
        return Answer.BEGIN
    return Answer.AT_ONCE if new.insists else Answer.KEEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Whether a stop saves."""

    save: bool
    why: str


def weigh(
    *,
    wanted: bool,
    left_s: float | None,
    predicted_s: float | None,
    step: int,
    saved_step: int,
    began_step: int,
) -> Choice:
    """Whether to save on the agreed step. A save that can't end in time is not started.

    Except where the run would never get anywhere otherwise: a job that is stopped again and again before its first
    save has nothing to lose by trying. What is killed half-way is never committed, so trying is safe.

    Args:
        wanted: the request asks for a save.
        left_s: until the deadline; None where there is none.
        predicted_s: how long a save takes, by those that were measured; None where none was.
        step: the step that was agreed on.
        saved_step: the newest checkpoint's step, 0 where there is none.
        began_step: the step that this start of the run began at.
    """
    if step <= saved_step:
        return Choice(save=False, why=f"step {step} is saved already" if step else "nothing was trained")
    if not wanted:
        return Choice(save=False, why="a stop without a save was asked for")
    if left_s is None:
        return Choice(save=True, why="there is no deadline")
    if predicted_s is None:
        return Choice(save=True, why=f"{left_s:.1f} s are left, and no save was measured yet")
    left_s = max(0.0, left_s)
    needed = predicted_s * SLACK + LEAST_MARGIN_S
    if needed <= left_s:
        return Choice(save=True, why=f"a save takes about {predicted_s:.1f} s, and {left_s:.1f} s are left")
    short = f"a save takes about {predicted_s:.1f} s, and only {left_s:.1f} s are left"
    if saved_step <= began_step:
        return Choice(save=True, why=f"{short}; trying all the same, as nothing new was saved since the start")
    return Choice(save=False, why=f"{short}: the checkpoint of step {saved_step} stays the newest")
