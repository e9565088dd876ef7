"""Seeded mishaps for runs under the launcher: at which moment of which step who dies, and how."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.launching import Elastic, Outcome

MOMENTS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mishap:
    """One failure or stop. It comes about once, when rank `rank` (or, for None, each) gets to this moment."""

    step: int
    moment: str
    act: str
    """``die``, ``fall_over`` or ``stop``, as the prelude knows them."""
    rank: int | None


def draw(seed: int, count: int, last_step: int, acts: Sequence[tuple[str, bool]], ranks: int = 2) -> list[Mishap]:
    """`count` mishaps at steps of their own, in order of step.

    Args:
        acts: what may happen, and whether it happens to all ranks alike or to one of them.
    """
    source = random.Random(seed)
    window = last_step // count
    # Apart from one another: the ranks stop one step after they are asked, and a death would get in the way.
    steps = [window * number + source.randint(1, max(1, window - 2)) for number in range(count)]
    chosen = [source.choice(acts) for _ in steps]
    return [
        Mishap(
            step=step,
            moment="on_train_batch_end" if act == "stop" else source.choice(MOMENTS),
            act=act,
            rank=None if all_alike else source.randrange(ranks),
        )
        for step, (act, all_alike) in zip(steps, chosen, strict=True)
    ]


STRIKING = """
from elastic_fit.callbacks import session


class Strikes(pl.Callback):
    def __init__(self, number, step, moment, act, rank):
        self.mark, self.step, self.rank = HERE / f"mishap-{number}", step, rank
        self.act = {"die": die, "fall_over": fall_over, "stop": lambda: os.kill(LAUNCHER, signal.SIGTERM)}[act]
        self.has_struck = False
        setattr(self, moment, self.look)

    def look(self, trainer, *_):
        if trainer.global_step >= self.step and self.rank in (None, RANK) and self.comes_about():
            self.has_struck = True
            self.act()

    def comes_about(self):
        # In one attempt alone: of a mishap of all ranks, the first to die may take one along that had not come so far.
        context = session.current().context
        attempt = f"{context.generation}-{context.attempt}"
        try:
            self.mark.symlink_to(attempt)
        except FileExistsError:
            return os.readlink(self.mark) == attempt and not self.has_struck
        return True
"""


def script_of(body: str, mishaps: Sequence[Mishap]) -> str:
    """`body` with ``MISHAPS``, a list of callbacks, defined before it."""
    made = ", ".join(
        f"Strikes({number}, {one.step}, {one.moment!r}, {one.act!r}, {one.rank})" for number, one in enumerate(mishaps)
    )
    return f"LAUNCHER = {os.getpid()}\n{STRIKING}\nMISHAPS = [{made}]\n{body}"


def run_to_the_end(
    elastic: Elastic, body: str, mishaps: Sequence[Mishap], *flags: str, workers: int = 2
) -> tuple[Outcome, int]:
    """Start the command again after each stop until it has finished.

    Returns the last outcome, and how often workers were started again, but for readers that never began: those are a
    mishap of Python's own, which may come on top (see ``callbacks/_dataloader.py``).
    """
    script = script_of(body, mishaps)
    stops = sum(one.act == "stop" for one in mishaps)
    for _ in range(stops + 1):
        outcome = elastic(script, "--max-restarts", "20", *flags, workers=workers)
        if outcome.code != 75:
            break
    assert outcome.code == 0, outcome.said + outcome.output()[-4000:]
    came_about = {path.name.split("-")[1] for path in Path(outcome.run.parent).glob("mishap-*")}
    assert len(came_about) == len(mishaps), "a mishap did not come about"
    unborn = outcome.output().count("has never begun")
    return outcome, len(outcome.events("workers_started")) - 1 - unborn
