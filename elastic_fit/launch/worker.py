"""Bootstrap inside a worker: runs the user's script as ``python script.py`` would, with elastic-fit in place."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib.machinery
import io
import json
import linecache
import os
import runpy
import signal
import sys
import time
import traceback
import types
from pathlib import Path
from typing import NoReturn

from elastic_fit.supervisor.board import Board, Phase, Word
from elastic_fit.supervisor.context import WorkerContext
from elastic_fit.supervisor.exits import Exit as Status
from elastic_fit.supervisor.signals import STOP_SIGNALS

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def main(kind: str, target: str, args: list[str]) -> int:
    """Run a script or a module to its end; returns the exit status.

    Args:
        kind: ``script`` or ``module``.
        target: path of the script or name of the module.
        args: the script's own arguments.
    """
    context = WorkerContext.from_environment()
    if context is None:
        raise RuntimeError("the worker's bootstrap was started without a worker context")
    board = Board.open(Path(context.board))
    board[Word.PID] = os.getpid()
    board.enter(Phase.FORKED)
    _show_in_ps(target)

    from elastic_fit import callbacks

    callbacks.install(context, board)
    faulthandler.register(signal.SIGQUIT, all_threads=True)  # by which the agent asks for the stacks
    board.enter(Phase.SCRIPT)
    status = _guarded(kind, target, args, board)
    if _is_worker(board):
        board.enter(Phase.DONE)
    if status != 0:
        _leave(status)
    return status


def _is_worker(board: Board) -> bool:
    """Whether this still is the worker, and no child that the script has forked and let run to an end of its own."""
    return board[Word.PID] == os.getpid()


def _show_in_ps(target: str) -> None:
    """All workers are forks of one command line: name this one for ``ps -o comm``, ``top`` and ``pgrep``."""
    with contextlib.suppress(OSError):  # no /proc: then not
        Path("/proc/self/comm").write_text(f"rank{os.environ.get('RANK', '?')} {Path(target).name}"[:15])


def _leave(status: int) -> NoReturn:
    """End a failed or stopped worker without the interpreter's own teardown, which takes longer than the restart.

    Exit handlers run and files that the script left open are flushed; threads and destructors are not waited for.
    """
    atexit._run_exitfuncs()
    for thing in gc.get_objects():
        if type(thing) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
            with contextlib.suppress(OSError, ValueError):  # closed, or its disk is full: nothing is left to be done
                thing.flush()
    os._exit(status)


def _guarded(kind: str, target: str, args: list[str], board: Board) -> int:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # those that have come so far are heard here
        _run(kind, target, args)
    except SystemExit as end:
        return _status_of(end, board)
    except BaseException as error:  # noqa: BLE001 - whatever ends the script is reported and becomes the exit status
        _report(error, board)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _run(kind: str, target: str, args: list[str]) -> None:
    sys.argv = [target, *args]
    if kind == "module":
        sys.path[0] = os.getcwd()
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    path = os.path.abspath(target)
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    # Like the interpreter itself: one lasting __main__, so that pickles, spawned children and exit handlers find it.
    main_module = types.ModuleType("__main__")
    main_module.__file__ = target
    main_module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    main_module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main_module
    source = Path(path).read_bytes()
    exec(compile(source, target, "exec"), main_module.__dict__)


def _status_of(end: SystemExit, board: Board) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        if end.code not in (Status.FINISHED, Status.SAVED, Status.TERMINATED):
            _write_error_file(end, f"SystemExit: {end.code}", "", board)
        return end.code & 0xFF
    _write_error_file(end, f"SystemExit: {end.code}", "", board)
    _say(f"{end.code}\n")
    return 1


def _report(error: BaseException, board: Board) -> None:
    """Leave the traceback, without our own frames, for the agent, and print it."""
    own = (__file__, runpy.run_module.__code__.co_filename)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    linecache.checkcache()
    text = "".join(traceback.format_exception(type(error), error, trace))
    _write_error_file(error, f"{type(error).__name__}: {error}", text, board)
    _say(text)


def _say(text: str) -> None:
    """On stderr; on what it was at the start, where the script has closed it or has put there what fails."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except Exception:  # noqa: BLE001 - the script's own object may raise anything
        with contextlib.suppress(OSError):
            os.write(2, text.encode(errors="backslashreplace"))


def _write_error_file(error: BaseException, message: str, text: str, board: Board) -> None:
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path or not _is_worker(board):
        return
    now = time.time()
    record = {
        # The part that torchelastic's own tools read.
        "message": {"message": message, "extraInfo": {"py_callstack": text, "timestamp": str(int(now))}},
        "type": type(error).__name__,
        "bases": [base.__name__ for base in type(error).__mro__],
        "traceback": text,
        "printed": bool(text) and sys.stderr is sys.__stderr__,  # else a script has sent it elsewhere
        "rank": int(os.environ.get("RANK", "0")),
        "step": board[Word.STEP],
        "t": now,
    }
    try:
        Path(path).write_text(json.dumps(record))
    except OSError as failure:
        _say(f"elastic-fit: can't write {path}: {failure.strerror}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
