"""The end of a command: what the ledger keeps of it, and the person's last line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from elastic_fit.supervisor.errors import ElasticFitError, StorageError
from elastic_fit.supervisor.exits import Exit
from elastic_fit.supervisor.goodput import Goodput, account
from elastic_fit.supervisor.ledger import Ledger, read

if TYPE_CHECKING:
    from elastic_fit.launch.render import Console


def tally(ledger: Ledger) -> Goodput | None:
    """The run's account so far; None where its ledger can't be read: that is no reason for a run to end as another."""
    try:
        return account(read(ledger.path))
    except StorageError:
        return None


@contextmanager
def noted(ledger: Ledger) -> Iterator[None]:
    """Have the ledger tell also of an error that ends this launcher.

    Of the launcher alone (`left`): the run may be another supervisor's by then, or other nodes go on with it.
    """
    try:
        yield
    except BaseException as error:
        ledger.write("finish", code=int(_status_after(error)), left=True, error=f"{type(error).__name__}: {error}")
        raise


def _status_after(error: BaseException) -> int:
    if isinstance(error, ElasticFitError):
        return error.exit_code
    return Exit.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Exit.INTERNAL


def close(
    status: Exit,
    result: Goodput | None,
    ledger: Ledger,
    console: Console,
    *,
    left: bool = False,
    fresh: bool = False,
) -> Exit:
    """Write down and say how the run has ended, or this node's part of it (`left`); returns its exit status.

    `fresh`: the very same command would not go on, but start over.
    """
    fields: dict[str, Any] = {"left": True} if left else {}
    if result is not None:
        fields |= {name: getattr(result, name) for name in ("steps", "restarts", "repeated")}
        fields["productive_share"] = round(result.productive_share, 4)
    ledger.write("finish", code=int(status), **fields)
    console.finish(status, result, ledger_failure=ledger.failure)
    if status is Exit.SAVED and fresh:
        console.line("hint     run it again without --fresh to go on")
    return status
