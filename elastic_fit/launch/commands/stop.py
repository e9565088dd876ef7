"""``elastic-fit stop``: ask a run to save and stop, from any node that sees its folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from elastic_fit.launch.commands.arguments import ArgumentParser
from elastic_fit.launch.render import Console
from elastic_fit.launch.stopping import Order
from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.ledger import Event, read
from elastic_fit.supervisor.rundir import RunDir

SCHEMA_VERSION = 1
ANSWER_S = 10.0
"""How long a launcher may take to hear the order; it looks twice a second."""
LOOK_S = 0.1
BEYOND_GRACE_S = 15.0
"""How much longer than its grace a run may take to say that it has ended."""
NEVER_ENDED = "a launcher has heard it and not said since that the run has ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What came of it."""

    state: str
    """``not running``, ``no answer``, ``stopping``, ``stopped`` or ``finished``."""
    code: int | None = None
    """The run's exit status, once it has ended."""
    saved_step: int | None = None
    """The step of the newest checkpoint that was saved since the launchers started."""
    why: str = ""
    """What was decided about the save; or why there is no answer, where the order was heard."""


def main(argv: Sequence[str], console: Console) -> int:
    """Ask; returns 0 where the run stops (with ``--wait``: has stopped or finished), 1 where nothing runs there."""
    parser = ArgumentParser(
        prog="elastic-fit stop",
        description="Ask a run to stop: all ranks save on one agreed step, and the run ends with exit code 75. "
        "Exit status 0 where a launcher has heard it (with --wait: where the run has ended), 1 where none runs there.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a run folder")
    save = parser.add_mutually_exclusive_group()
    save.add_argument("--save", dest="save", action="store_true", default=True, help="save first (the default)")
    save.add_argument("--no-save", dest="save", action="store_false", help="stop without a save")
    parser.add_argument("--wait", action="store_true", help="wait until the run has ended")
    parser.add_argument("--json", action="store_true", help="print data instead of lines")
    args = parser.parse_args(argv)
    folder = RunDir(args.run_dir)
    if not folder.is_run():
        raise UsageError(f"{args.run_dir} is not a run folder", hint="elastic-fit stop RUN_DIR")
    told = stop(folder, save=args.save, wait=args.wait)
    if args.json:
        console.data({"schema_version": SCHEMA_VERSION, **asdict(told)})
    else:
        console.text(text_of(told))
    return int(told.state in ("not running", "no answer"))


def stop(folder: RunDir, *, save: bool, wait: bool, pause: Callable[[float], None] = time.sleep) -> Told:
    """Leave the order, and hear what comes of it in the ledger."""
    if not is_running(read(folder.events)):
        return Told(state="not running")
    order = Order.by_this_user(save=save)
    try:
        order.leave(folder.stop_order)
    except PermissionError as error:
        raise UsageError(
            f"can't leave the order in {folder.root}: {error.strerror}", hint="signal the launcher, or ask its owner"
        ) from error
    until, heard = time.monotonic() + ANSWER_S, None
    while time.monotonic() < until:
        events = read(folder.events)
        if heard is None:
            heard = next((n for n, one in enumerate(events) if one.get("id") == order.id), None)
            if heard is not None:  # the grace counts from there
                until = time.monotonic() + float(events[heard]["deadline_s"]) + BEYOND_GRACE_S
            elif not is_running(events):
                return Told(state="not running")
        if heard is not None:
            end = end_of(events, heard)
            if end is not None:
                return _told(events, heard, end)
            if not wait:
                return Told(state="stopping")
        pause(LOOK_S)
    return Told(state="no answer", why="" if heard is None else NEVER_ENDED)


def end_of(events: Sequence[Event], heard: int) -> int | None:
    """Which of the events since `heard` has ended the run: the run's own end, or that of the last node to leave it."""
    ends = (n for n in range(heard, len(events)) if events[n].event == "finish")
    return next((n for n in ends if is_end_of_run(events[n]) or not is_running(events[: n + 1])), None)


def is_running(events: Sequence[Event]) -> bool:
    """Whether a launcher has started that neither has left alone nor was there when the run ended."""
    launchers: set[tuple[str, int]] = set()
    for one in events:
        if one.event == "start" and not one.get("guest"):
            launchers.add((one.host, one.pid))
        elif is_end_of_run(one):
            launchers.clear()
        elif one.event == "finish":
            launchers.discard((one.host, one.pid))
    return bool(launchers)


def is_end_of_run(event: Event) -> bool:
    """Whether the run has ended with it, and not just one node's part of it: guests and spares come and go."""
    return event.event == "finish" and not event.get("guest") and not event.get("left")


def text_of(told: Told) -> str:
    """In a line, for people."""
    if told.state == "not running":
        return "nothing runs there"
    if told.state == "no answer":
        return f"{told.why or 'no launcher has answered'}: it may have been killed"
    if told.state == "stopping":
        return "the run is stopping"
    saved = (
        f"the newest checkpoint is of step {told.saved_step}" if told.saved_step is not None else "nothing new saved"
    )
    return f"{told.state} (exit {told.code}): {saved}{f' ({told.why})' if told.why else ''}"


def _told(events: Sequence[Event], heard: int, end: int) -> Told:
    since = events[_start(events, heard, end) : end + 1]
    steps = [int(one["step"]) for one in since if one.event in ("save", "rescue")]
    why = next((str(one["why"]) for one in reversed(since) if one.event == "stop_decision"), "")
    code = int(events[end]["code"])
    return Told(state="finished" if code == 0 else "stopped", code=code, saved_step=max(steps, default=None), why=why)


def _start(events: Sequence[Event], heard: int, end: int) -> int:
    """Where the first of the launchers has started that were there when the order was heard, and have said so since."""
    began = {(one.host, one.pid): n for n, one in enumerate(events[:heard]) if one.event == "start"}
    said = {(one.host, one.pid) for one in events[heard : end + 1]}
    return min((n for who, n in began.items() if who in said), default=0)
