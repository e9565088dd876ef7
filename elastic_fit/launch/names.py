"""Names and addresses of hosts, for which nobody here waits long.

The C library waits ten seconds for a name server that is silent, each time anew. What it does not say in time is
replaced by what this host knows of itself.
"""

from __future__ import annotations

import functools
import queue
import socket
import threading
from collections.abc import Callable

import psutil

from elastic_fit.supervisor.errors import UsageError

PATIENCE_S = 2.0
"""How long a name server may take to answer."""


def look_up(
    name: str,
    *,
    resolve: Callable[[str], str] = socket.gethostbyname,
    patience_s: float = PATIENCE_S,
    tell: Callable[[str], None] | None = None,
) -> str | None:
    """What `resolve` makes of a host's name: by default its address. None where nobody knows, or says so in time.

    `tell` is told where it isn't said in time.
    """
    answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(resolve(name))
        except OSError:
            answer.put(None)

    threading.Thread(target=ask, name=f"look-up-{name}", daemon=True).start()
    try:
        return answer.get(timeout=patience_s)
    except queue.Empty:
        if tell is not None:
            tell(f"the name server has not told within {patience_s:.0f} s who {name} is: going on without it")
        return None


@functools.cache
def full_name() -> str:
    """This host's name as others know it, as far as it can be found out. Looked up once."""
    name = socket.gethostname()
    return look_up(name, resolve=socket.getfqdn) or name


def address_of(given: str | None, tell: Callable[[str], None]) -> str:
    """Where others are to reach this host: as `given` (``--local-addr``), else `own_address`.

    Raises UsageError where what is given is nothing that another agent can dial.
    """
    if not given:
        return own_address(tell)
    address = look_up(given)
    if address is None or address == "0.0.0.0":
        raise UsageError(
            f"--local-addr {given} is no IPv4 address, and no name of one, at which other nodes reach this host",
            hint="ip -4 addr shows which ones it has; left out, the host's name is looked up",
        )
    return address


def own_address(tell: Callable[[str], None]) -> str:
    """An address of this host that others can reach: what its name resolves to, else that of its first interface."""
    found = look_up(socket.gethostname(), tell=tell) or "127.0.0.1"
    if not found.startswith("127."):
        return found
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    return "127.0.0.1"


def is_here(host: str) -> bool:
    """Whether that name or address is this machine's."""
    wanted = look_up(host)
    if wanted is None:
        return host == socket.gethostname()
    known = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return wanted in known


def interface_of(address: str) -> str | None:
    """Name of the interface that has `address`."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.family == socket.AF_INET and known.address == address for known in addresses):
            return str(name)
    return None


def is_free(port: int) -> bool:
    """Whether nobody listens on that port: a second agent on the endpoint's host takes another one."""
    try:
        socket.create_server(("0.0.0.0", port)).close()
    except OSError:
        return False
    return True
