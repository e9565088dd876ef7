"""The only module that prints: rich on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from elastic_fit.launch.outlet import GONE, Outlet
from elastic_fit.supervisor.errors import ElasticFitError, StorageError
from elastic_fit.supervisor.exits import Exit as Status
from elastic_fit.supervisor.policy import UNREACHABLE

if TYPE_CHECKING:
    from elastic_fit.launch.parser import Invocation
    from elastic_fit.supervisor.context import ResumePoint
    from elastic_fit.supervisor.goodput import Goodput
    from elastic_fit.supervisor.policy import GiveUp, Restart, WorkerFailure
    from elastic_fit.supervisor.rundir import RunDir
    from elastic_fit.supervisor.stop import StopRequest

NAME = "elastic-fit"
TRACEBACK_LINES = 40
PATIENCE_S = 2.0
"""How long a console that nobody reads holds the launcher up, once: what it has to tell then is dropped."""
PRESS_AGAIN = "; press again to end at once"


class Console:
    """What a person reads. Everything goes to `err`, except data that was asked for, which goes to `out`.

    Args:
        out: data.
        err: lines for people; by default stderr, where workers' output is shown as well.
    """

    def __init__(self, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._outlet = _outlet_of(self._err)
        self._shows_workers = err is None
        # One that moves its cursor, and not an editor's or a pipeline's that only shows lines.
        self._is_terminal = self._err.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._has_color = self._is_terminal and not os.environ.get("NO_COLOR")

    # lines

    def line(self, text: str, style: str = "") -> None:
        """One line, on a fresh one: a progress bar that is being drawn is left as it stands above."""
        start = "\r\x1b[K" if self._is_terminal else ""
        head = f"\x1b[1;{style or '36'}m{NAME}\x1b[0m" if self._has_color else NAME
        self._say(f"{start}{head}: {text}\n")

    def error(self, error: ElasticFitError) -> None:
        """What went wrong and what to do about it."""
        self.line(f"error: {error.message}", style="31")
        if error.hint:
            self.line(f"hint: {error.hint}")

    def _say(self, text: str) -> None:
        """To the person, who may have left, have no room for it or not read: none of that ends what is being done."""
        if self._outlet is not None:
            self._outlet.write(text.encode(getattr(self._err, "encoding", None) or "utf-8", "backslashreplace"))
        elif not self._err.closed:
            self._err.write(text)

    def _put(self, text: str) -> None:
        """To whoever asked for data: a part of it must not pass for all."""
        try:
            print(text, file=self._out, flush=True)
        except OSError as failure:
            _send_nowhere(self._out)
            if failure.errno not in GONE:  # else nobody wants the rest
                raise StorageError(
                    f"can't write to stdout: {failure.strerror}", hint="what is there is not all of it"
                ) from failure

    def settle(self) -> None:
        """The last thing: leave a terminal in order, and write out what others, such as a logger, have buffered."""
        if self._is_terminal:
            self._say("\x1b[?25h")  # the cursor, which a killed worker's progress bar had hidden
        for file in (self._out, self._err):
            try:
                file.flush()
            except (OSError, ValueError):
                _send_nowhere(file)

    # data

    def data(self, record: Mapping[str, Any]) -> None:
        """JSON on stdout."""
        self._put(json.dumps(record, indent=2, default=str))

    def text(self, text: str) -> None:
        """Text on stdout, as it is."""
        self._put(text.rstrip("\n"))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table on stdout: drawn on a terminal, tab-separated elsewhere."""
        if self._out.isatty():
            from rich.console import Console as Rich
            from rich.table import Table

            table = Table(*columns, box=None, header_style="bold")
            for row in rows:
                table.add_row(*row)
            rich = Rich(file=self._out)
            with rich.capture() as drawn:
                rich.print(table)
            self.text(drawn.get())
            return
        self.text("\n".join("\t".join(row) for row in (columns, *rows)))

    # a run

    def set_aside(self, folder: Path | None) -> None:
        """`--fresh` has moved the old folder."""
        if folder is not None:
            self.line(f"starting over; the old run is kept in {folder}")

    def start(
        self, invocation: Invocation, folder: RunDir, generation: int, resume: Sequence[ResumePoint], logs: Path
    ) -> None:
        """The five lines at the start."""
        self.line(f"resume   {resume_text(resume)}")
        self.line(f"budget   {invocation.max_restarts} restarts without progress, then the run ends")
        self.line(f"store    {folder.checkpoints} (generation {generation}, {save_text(invocation)})")
        self.line(f"logs     {logs}")
        events, root = (shlex.quote(str(path)) for path in (folder.events, folder.root))
        self.line(f"watch    tail -f {events}   elastic-fit ls {root}")

    def plan(self, invocation: Invocation, folder: RunDir, resume: Sequence[ResumePoint]) -> None:
        """What `--dry-run` shows."""
        kind = ["-m"] if invocation.module else []
        command = shlex.join([*kind, invocation.script, *invocation.script_args])
        self.line(f"would run  {command}")
        args = invocation.torchrun
        least, _, most = str(args.nnodes).partition(":")
        nodes = f"{least} to {most}" if most not in ("", least) else least
        self.line(f"on         {nodes} {'node' if nodes == '1' else 'nodes'}, {args.nproc_per_node} workers each")
        self.line(f"in         {folder.root}")
        self.line(f"resume     {resume_text(resume)}")
        self.line(f"store      {save_text(invocation)}")

    def failed(self, root: WorkerFailure, decision: Restart | GiveUp, *, reached: int, resume: int) -> None:
        """A worker has failed: root cause, decision, loss, hint."""
        is_above = root.shown and self._shows_workers
        where = ", its traceback is above" if is_above else ""
        who = f"rank {root.rank} (pid {root.pid})" if root.pid else f"rank {root.rank}"
        self.line(f"{who} failed first{where}: {root.cause}", style="31")
        for text in () if is_above else root.traceback.rstrip().splitlines()[-TRACEBACK_LINES:]:
            self._say(f"  {text}\n")
        lost = max(0, reached - resume)
        self.line(f"lost     {lost} optimizer steps (had reached {reached}, going on from {resume})")
        self.line(f"decision {'restart' if hasattr(decision, 'backoff_s') else 'the run ends'}: {decision.why}")
        # Of what has nothing to do with the script, the general hint would be wrong.
        general = "" if root.type == UNREACHABLE else getattr(decision, "hint", "")
        hint = general or hint_for(root)
        if hint:
            self.line(f"hint     {hint}")

    def stopping(self, request: StopRequest) -> None:
        """Somebody asks the run to stop."""
        who = "" if request.rank is None else f" to rank {request.rank}"
        what = "saving and stopping" if request.save else "stopping without a save"
        again = PRESS_AGAIN if request.is_interrupt else ""
        self.line(f"{request.reason}{who}: {what}, at most {request.grace_s:.0f} s{again}", style="33")

    def asked_again(self, request: StopRequest, left_s: float) -> None:
        """It is stopping already: who has pressed Ctrl-C is told how long they wait, and how not to."""
        if request.is_interrupt:
            self.line(f"{request.reason}: stopping already, at most {left_s:.0f} s more{PRESS_AGAIN}", style="33")

    def frozen(self, rank: int, pid: int) -> None:
        """A worker is stopped and nobody continues it; it is killed."""
        self.line(f"rank {rank} (pid {pid}) is stopped (SIGSTOP), and the others wait for it: killing it", style="33")

    def recovered(self, seconds: float, step: int) -> None:
        """Training goes on after a failure."""
        self.line(f"back at step {step}, {seconds:.2f} s after the failure", style="32")

    def finish(self, status: Status, goodput: Goodput | None, *, ledger_failure: OSError | None = None) -> None:
        """The closing line, and what could not be written. Without `goodput` its ledger could not be read."""
        self.line(f"{status.name.lower()} (exit {int(status)}): {goodput_text(goodput)}")
        if status is Status.STORAGE:
            self.line("hint     its end is not on disk: free some space, or mend the disk, and start it again")
        for text in goodput.save_failures[-3:] if goodput is not None else ():
            self.line(f"a save failed: {text}", style="31")
        if ledger_failure is not None:
            self.line(f"the ledger lacks what came last: {ledger_failure.strerror}", style="31")


def _outlet_of(file: IO[str]) -> Outlet | None:
    """None where there is no descriptor behind it."""
    try:
        return Outlet(file.fileno(), patience_s=PATIENCE_S)
    except (OSError, ValueError):
        return None


def _send_nowhere(file: IO[str]) -> None:
    """Let the null device take the rest: what stays buffered would fail the interpreter's last flush (exit 120)."""
    if file.closed:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


def resume_text(points: Sequence[ResumePoint]) -> str:
    """Where the run goes on from, in a line."""
    if not points:
        return "none: starting at step 0"
    newest = points[-1]
    state = "finished" if newest.finished else newest.kind
    several = f", fit {newest.fit} of the script" if newest.fit > 1 else ""
    return f"step {newest.step} ({state}{several}) from {newest.path}"


def goodput_text(goodput: Goodput | None) -> str:
    """What a run has done, in a line."""
    if goodput is None:
        return "what it has done can't be told, since its ledger can't be read"
    share = f", {goodput.productive_share:.1%} of the time productive" if goodput.steps else ""
    return f"{goodput.steps} steps, {goodput.restarts} restarts, {goodput.repeated} steps repeated{share}"


def save_text(invocation: Invocation) -> str:
    """How often the run saves, in words."""
    settings = invocation.settings
    often = [f"every {settings.checkpoint_steps} steps"] if settings.checkpoint_steps else []
    often += [f"every {settings.checkpoint_interval_s:g} s"] if settings.checkpoint_interval_s else []
    return f"saving each epoch, {', '.join(often)}; the newest {settings.keep} stay"


def hint_for(root: WorkerFailure) -> str:
    """What a death by signal, or an error that is known, usually means."""
    if "Weights only load failed" in root.traceback:
        return "the checkpoint holds more than tensors (a Path in the hyperparameters?): --load-unsafe loads it anyway"
    if root.type == UNREACHABLE:
        return "look at the firewall between them; --master-port and --rdzv-conf port=... say which ports are used"
    return {
        "SIGKILL": "SIGKILL often is the kernel's out-of-memory killer: look at dmesg and at the cgroup's limit",
        "SIGSEGV": "a segmentation fault: set PYTHONFAULTHANDLER=1 for a stack",
        "SIGBUS": "SIGBUS often is a full /dev/shm: look at the size of shared memory",
        "SIGABRT": "an abort in native code: its message is in the rank's .err log",
    }.get(root.signal or "", "")
