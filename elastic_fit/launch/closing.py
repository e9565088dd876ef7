"""The end of a command: what the ledger keeps of it, and the person's last line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic_fit.launch.render import Console
    from elastic_fit.supervisor.exits import Exit as Status
    from elastic_fit.supervisor.goodput import Goodput
    from elastic_fit.supervisor.ledger import Ledger


def close(status: Status, result: Goodput, ledger: Ledger, console: Console, *, left: bool = False) -> Status:
    """Write down and say how the run has ended, or this node's part of it (`left`); returns its exit status."""
    ledger.write(
        "finish",
        code=int(status),
        **({"left": True} if left else {}),
        steps=result.steps,
        restarts=result.restarts,
        repeated=result.repeated,
        productive_share=round(result.productive_share, 4),
    )
    console.finish(status, result, ledger_failure=ledger.failure)
    return status
