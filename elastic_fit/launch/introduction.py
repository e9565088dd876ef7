"""Introduction: is the host that ``--rdzv-endpoint`` names part of the job that this node sees in its run folder?

Nodes agree in the run folder. A node whose folder is not the others' would find nobody there and train on its own;
the endpoint, where it is given, is how that is found out before anything starts.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from elastic_fit.launch.arbiter import Arbiter, roster_of
from elastic_fit.launch.links import GREETING_LIMIT, NONSENSE
from elastic_fit.launch.names import look_up
from elastic_fit.launch.rounds import NodeRefused
from elastic_fit.supervisor.errors import UsageError
from elastic_fit.supervisor.roster import Phase, Profile, Roster, refusal

DEFAULT_PORT = 29400
DIAL_S = 2.0
"""How long the endpoint may take to answer."""
PAUSE_S = 0.5
ASKED = 8
"""How many nodes are asked before a job is taken for gone."""
PATIENCE_S = 60.0
"""How long a node whose run folder is empty looks for the endpoint before it begins the job itself."""


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port from ``host[:port]``. Raises UsageError."""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", "")
    if not host or (port and not port.isdigit()):
        raise UsageError(
            f"--rdzv-endpoint {text} is not host or host:port", hint="for example --rdzv-endpoint h1:29400"
        )
    return host, int(port or DEFAULT_PORT)


def ask(host: str, port: int) -> Profile | None:
    """Who answers there; None where nobody does, or somebody who is no agent of ours."""
    address = look_up(host)
    if address is None:
        return None
    try:
        with (
            socket.create_connection((address, port), timeout=DIAL_S) as connection,
            connection.makefile("rb") as lines,
        ):
            message: dict[str, Any] = json.loads(lines.readline(GREETING_LIMIT))
            return Profile.parse(message["profile"])
    except (OSError, *NONSENSE):
        return None


def is_anybody_there(roster: Roster) -> bool:
    """Whether an agent of the job answers: one of its members, or who gathers them."""
    known = [*([roster.leading] if roster.leading else []), *roster.members][:ASKED]
    return any(found is not None and found.node == one.node for one in known for found in [ask(one.address, one.port)])


def open_roster(arbiter: Arbiter) -> Roster | None:
    """What the nodes of a job agree on there that has not been closed; None where there is none.

    Raises ArbiterLost where that can't be asked, StorageError where it makes no sense: then a job may live there.
    """
    found = arbiter.read()
    roster = roster_of(arbiter, found) if found is not None else None
    return roster if roster is not None and roster.phase is not Phase.CLOSED else None


def roster_at_work(arbiter: Arbiter) -> Roster | None:
    """`open_roster` of a job of which a node answers; None where all have died. Raises as that does."""
    roster = open_roster(arbiter)
    return roster if roster is not None and is_anybody_there(roster) else None


def introduce(
    endpoint: tuple[str, int],
    traits: Mapping[str, str],
    *,
    is_first: bool,
    tell: Callable[[str], None],
    is_told: Callable[[], bool],
    patience_s: float = PATIENCE_S,
) -> None:
    """See that the agent at `endpoint`, if there is one, is of the job that this node is about to join.

    Args:
        endpoint: host and port that all nodes were given; not this one's own.
        traits: this node's, as in its profile.
        is_first: nobody is to be found in this node's run folder; then the endpoint is waited for.
        tell: told once that it is.
        is_told: whether somebody asks this node to stop: then it waits no longer.
        patience_s: for how long.

    Raises NodeRefused where it is another job, or another folder.
    """
    host, port = endpoint
    deadline = time.monotonic() + (patience_s if is_first else 0.0)
    found = ask(host, port)
    if found is None and is_first:
        tell(f"the run folder is empty: looking for {host}:{port} for at most {patience_s:.0f} s")
    while found is None and time.monotonic() < deadline and not is_told():
        time.sleep(PAUSE_S)
        found = ask(host, port)
    why = refusal(traits, found.traits) if found is not None else None
    if why is not None:
        raise NodeRefused(
            f"{socket.gethostname()} can't be part of the job of {host}:{port}: {why}",
            hint="every node needs the same versions, the same script and the same run folder on a shared file system",
        )
