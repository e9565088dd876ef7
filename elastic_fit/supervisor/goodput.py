"""Where the time went: from the ledger to productive, saving, lost, restarting and idle seconds. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from elastic_fit.supervisor.ledger import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """A run's account, over all its generations. Times are seconds of wall clock."""

    total_s: float = 0.0
    """From each start to its end, summed; time between two commands is nobody's."""
    saving_s: float = 0.0
    """Training stood still for a checkpoint."""
    restarting_s: float = 0.0
    """From a failure to the first step after it, and from a start to its first step."""
    lost_s: float = 0.0
    """Spent on steps that had to be done again."""
    steps: int = 0
    """The highest optimizer step."""
    restarts: int = 0
    repeated: int = 0
    """Optimizer steps that were done more than once."""
    save_failures: tuple[str, ...] = ()
    """What the saves that failed since the newest start have said."""

    @property
    def productive_s(self) -> float:
        """What is left when all else is taken off."""
        return max(0.0, self.total_s - self.saving_s - self.restarting_s - self.lost_s)

    @property
    def productive_share(self) -> float:
        """Between 0 and 1; 0 where nothing has run."""
        return self.productive_s / self.total_s if self.total_s else 0.0


@dataclass(slots=True)
class _Account:
    launchers: set[tuple[str, int]] = field(default_factory=set)
    save_failures: list[str] = field(default_factory=list)
    began: float = 0.0
    last: float = 0.0
    total: float = 0.0
    saving: float = 0.0
    restarting: float = 0.0
    lost: float = 0.0
    steps: int = 0
    restarts: int = 0
    repeated: int = 0
    trained_since: float = 0.0
    trained_steps: int = 0
    waiting_since: float = 0.0


def account(events: Iterable[Event]) -> Goodput:
    """Add up a ledger. Unknown events only move the clock."""
    book = _Account()
    for event in events:
        _note_launchers(book, event)
        book.last = max(book.last, event.t)
        if event.event == "save":
            book.saving += float(event.get("stall_s") or event.get("seconds") or 0.0)
        elif event.event == "save_failed":
            book.save_failures.append(str(event.get("error")))
        _note_training(book, event)
        book.steps = max(book.steps, int(event.get("step") or 0))
    _close(book)
    return Goodput(
        total_s=book.total,
        saving_s=book.saving,
        restarting_s=book.restarting,
        lost_s=book.lost,
        steps=book.steps,
        restarts=book.restarts,
        repeated=book.repeated,
        save_failures=tuple(book.save_failures),
    )


def _note_launchers(book: _Account, event: Event) -> None:
    """The clock runs while a launcher does. A node that joins a job which goes on begins nothing."""
    if event.event == "generation":
        _close(book)  # one supervisor alone holds the run: whoever was there before is gone
    elif event.event == "start":
        if not book.launchers:
            _close(book)
            book.began = book.waiting_since = book.last = event.t
            book.trained_since = 0.0
            book.save_failures.clear()
        book.launchers.add((event.host, event.pid))
    elif event.event == "finish":
        book.launchers.discard((event.host, event.pid))


def _close(book: _Account) -> None:
    """The clock has stood still since the last event."""
    if book.began:
        book.total += book.last - book.began
        book.restarting += book.last - book.waiting_since if book.waiting_since else 0.0
    book.began = book.waiting_since = 0.0
    book.launchers.clear()


def _note_training(book: _Account, event: Event) -> None:
    if event.event == "training":
        if book.waiting_since:
            book.restarting += event.t - book.waiting_since
        book.waiting_since = 0.0
        book.trained_since, book.trained_steps = event.t, int(event.get("step") or 0)
    elif event.event == "worker_exit" and event.get("code") not in (0, 75) and not book.waiting_since:
        book.waiting_since = event.t
    elif event.event == "steps_repeated":
        steps = int(event.get("steps") or 0)
        book.repeated += steps
        done = int(event.get("to_step") or 0) - book.trained_steps
        if steps and done > 0 and book.trained_since:
            book.lost += (book.waiting_since - book.trained_since) * min(1.0, steps / done)
    elif event.event == "decision" and event.get("action") == "restart":
        book.restarts += 1
