"""Links between agents: TCP connections on which each says, beat by beat, who it is and where it stands.

Every message is the whole state of its sender, one JSON line (see `elastic_fit.supervisor.hearing`). A link whose
process dies is closed by its kernel, which the other end hears at once; dialing it again is then refused, and that is
how a dead agent differs from a cable that was pulled.

Who dials says whom it means. It knows that from the roster, so both ends agree in one place: a job needs no name here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from elastic_fit.supervisor.hearing import Heard
from elastic_fit.supervisor.roster import Profile

LINE_LIMIT = 1 << 20
"""Longest message, in bytes. Who sends more is not one of us."""
GREETING_LIMIT = 8 << 10
"""Longest first message, in which its sender says who it is."""
GREETING_S = 10.0
"""Who has not said who it is for so long after it was connected is hung up on: a port scanner, a health check."""
STRANGERS = 100
"""How many that have not said so yet are borne with; where more come, the one that came first has had its time."""
NONSENSE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""What taking up a message may raise. It is the fault of its sender, who may be anybody: the port is open to all."""
REDIAL_S = 0.5
"""Pause between attempts to reach a peer; an attempt that takes longer than `DIAL_S` is given up."""
DIAL_S = 1.0
OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PAUSE_S = 0.5
"""How long nobody is let in after this process could open no more files, or the system had no memory for it."""
DOUBT_S = 1.5
"""A link that was quiet for so long is dialed anew beside the old one: after a short cut TCP alone may stay silent."""


@dataclass(slots=True)
class Contacted(Heard):
    """One peer: what was heard of it, and how it is reached."""

    dialed_s: float = -1e9
    refusal: str | None = None
    """Why it says that this node can't be part of its job."""
    dialing: _Connection | None = None
    """The attempt to reach it that is under way."""


class _Connection:
    __slots__ = ("dialed", "incoming", "node", "opened_s", "outgoing", "sock", "standing")

    def __init__(self, sock: socket.socket, opened_s: float, *, dialed: str | None) -> None:
        self.sock = sock
        self.opened_s = opened_s
        self.dialed = dialed
        """The node that this end meant to reach; None where the other end dialed."""
        self.node: str | None = None
        """Who is at the other end, once it has said so."""
        self.standing = dialed is None
        self.incoming = b""
        self.outgoing = b""


class Links:
    """All connections of one agent. Not thread-safe: one thread calls everything.

    Args:
        address: the address to listen on.
        clock: seconds, monotonic.
        port: the port to listen on; 0 is a free one.
    """

    def __init__(self, address: str, *, clock: Callable[[], float] = time.monotonic, port: int = 0) -> None:
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        _allow_many_connections()
        self._listener = socket.create_server((address, port), backlog=1024)
        self._listener.setblocking(False)
        self._paused_s: float | None = None
        """Since when nobody is let in."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.port: int = self._listener.getsockname()[1]
        self.known: dict[str, Contacted] = {}
        self._connections: set[_Connection] = set()
        self._strangers: dict[_Connection, None] = {}
        """Those of them on which nobody has said yet who it is, the longest open first."""
        self._up: dict[str, set[_Connection]] = {}
        self._me: Profile | None = None
        self._state = b""
        self._said = 0
        """Number of the newest message."""

    def introduce(self, me: Profile) -> None:
        """Set what is said first on every connection."""
        self._me = me

    def watch(self, file: Any) -> None:
        """Have `poll` return early when `file` is readable; the caller drains it."""
        self._selector.register(file, selectors.EVENT_READ)

    # who is there

    def is_up(self, node: str) -> bool:
        """Whether a connection stands on which that node has said who it is."""
        return node in self._up

    def want(self, profiles: Iterable[Profile]) -> None:
        """Keep links with these, and forget those that are neither wanted nor connected."""
        wanted = {profile.node: profile for profile in profiles}
        now = self._clock()
        for node, profile in wanted.items():
            if node not in self.known:
                self.known[node] = Contacted(profile, heard_s=now)
            self._dial_if_due(node, now)
        for node in [node for node in self.known if node not in wanted and not self.is_up(node)]:
            del self.known[node]

    def _dial_if_due(self, node: str, now: float) -> None:
        peer = self.known[node]
        in_doubt = not self.is_up(node) or now - peer.heard_s > DOUBT_S
        if not in_doubt or now - peer.dialed_s < REDIAL_S:
            return
        if peer.dialing is not None:
            if now - peer.dialing.opened_s < DIAL_S:
                return
            self._drop(peer.dialing)
        peer.dialed_s = now
        try:
            sock = _begin_to_connect(peer.profile.address, peer.profile.port)
        except OSError as error:  # that address makes no sense here, or this host can't: it is not reached
            peer.refused = isinstance(error, ConnectionRefusedError)
            return
        peer.dialing = connection = _Connection(sock, now, dialed=node)
        self._add(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)

    # saying and hearing

    def say(self, state: dict[str, Any]) -> None:
        """Tell every connected peer where this node stands, now and to whoever connects later."""
        self._said += 1
        self._state = _line({"state": {**state, "number": self._said}})
        for connection in list(self._connections):
            if connection.standing and connection.node is not None:
                self._send(connection, self._state)

    def refuse(self, node: str, why: str) -> None:
        """Tell a peer that it can't be part of this job."""
        for connection in list(self._up.get(node, ())):
            self._send(connection, _line({"refusal": why}))

    def poll(self, timeout_s: float) -> bool:
        """Hear what has come, waiting at most so long; says whether there was anything new."""
        news = False
        if self._paused_s is not None and self._clock() - self._paused_s >= PAUSE_S:
            self._paused_s = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        for key, mask in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, _Connection):
                news |= self._serve(key.data, mask)
            else:
                news = True
        self._drop_strangers()
        return news

    def close(self) -> None:
        """Hang up and stop listening."""
        for connection in list(self._connections):
            self._drop(connection)
        if self._paused_s is None:
            self._selector.unregister(self._listener)
        self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        # Not more than that at a time: what has come from the others is read before one of them is hung up on.
        for _ in range(STRANGERS):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OUT_OF_MEANS:  # who waits there still will keep the listener readable
                    self._paused_s = self._clock()
                    self._selector.unregister(self._listener)
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(sock, self._clock(), dialed=None)
            self._add(connection, selectors.EVENT_READ)
            self._send(connection, self._greeting(connection) + self._state)

    def _add(self, connection: _Connection, events: int) -> None:
        self._connections.add(connection)
        self._strangers[connection] = None
        self._selector.register(connection.sock, events, connection)

    def _drop_strangers(self) -> None:
        """Hang up on those who have had time enough to say who they are."""
        latest_s = self._clock() - GREETING_S
        while self._strangers:
            first = next(iter(self._strangers))
            if first.opened_s > latest_s and len(self._strangers) <= STRANGERS:
                return
            self._drop(first)

    def _greeting(self, connection: _Connection) -> bytes:
        assert self._me is not None
        meant = {"to": connection.dialed} if connection.dialed is not None else {}
        return _line({"profile": asdict(self._me), **meant})

    def _serve(self, connection: _Connection, mask: int) -> bool:
        if not connection.standing:
            return self._stand(connection)
        if mask & selectors.EVENT_WRITE:
            self._send(connection, b"")
        if mask & selectors.EVENT_READ:
            return self._receive(connection)
        return False

    def _stand(self, connection: _Connection) -> bool:
        """A dialed connection has come about, or not."""
        number = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        peer = self.known.get(connection.dialed or "")
        if number:
            if peer is not None:
                peer.refused = number == errno.ECONNREFUSED
            self._drop(connection)
            return True
        connection.standing = True
        self._selector.modify(connection.sock, selectors.EVENT_READ, connection)
        self._send(connection, self._greeting(connection) + self._state)
        return False

    def _send(self, connection: _Connection, data: bytes) -> None:
        connection.outgoing += data
        try:
            sent = connection.sock.send(connection.outgoing) if connection.outgoing else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(connection)
            return
        connection.outgoing = connection.outgoing[sent:]
        if len(connection.outgoing) > LINE_LIMIT:
            self._drop(connection)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outgoing else 0)
        self._selector.modify(connection.sock, events, connection)

    def _receive(self, connection: _Connection) -> bool:
        try:
            data = connection.sock.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            self._redial_now(connection.node)
            return True
        *lines, connection.incoming = (connection.incoming + data).split(b"\n")
        try:
            for line in lines:
                _check_length(connection, line)
                self._understand(connection, json.loads(line))
            _check_length(connection, connection.incoming)
        except NONSENSE:
            self._drop(connection)
        return bool(lines)

    def _understand(self, connection: _Connection, message: dict[str, Any]) -> None:
        now = self._clock()
        if connection.node is None:
            self._greet(connection, message, now)
            return
        peer = self.known.get(connection.node)
        if peer is None:
            return
        if "refusal" in message:
            peer.refusal = str(message["refusal"])
        else:
            peer.hear(dict(message["state"]), now)

    def _greet(self, connection: _Connection, message: dict[str, Any], now: float) -> None:
        profile = Profile.parse(message["profile"])
        if connection.dialed is None:
            is_meant = self._me is not None and message["to"] == self._me.node
        else:
            is_meant = profile.node == connection.dialed
        if not is_meant:
            # Somebody else listens where the peer did: the peer is gone.
            if connection.dialed in self.known:
                self.known[connection.dialed].refused = True
            self._drop(connection)
            return
        connection.node = profile.node
        self._strangers.pop(connection, None)
        self._up.setdefault(profile.node, set()).add(connection)
        self._note_dialed(connection)
        known = self.known.setdefault(profile.node, Contacted(profile, heard_s=now))
        known.heard_s, known.refused = now, False

    def _note_dialed(self, connection: _Connection) -> None:
        """An attempt to reach a peer is over, well or not."""
        peer = self.known.get(connection.dialed or "")
        if peer is not None and peer.dialing is connection:
            peer.dialing = None

    def _redial_now(self, node: str | None) -> None:
        if node is not None and node in self.known and not self.is_up(node):
            self.known[node].dialed_s = -1e9

    def _drop(self, connection: _Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self._strangers.pop(connection, None)
        self._note_dialed(connection)
        if connection.node is not None and connection.node in self._up:
            self._up[connection.node].discard(connection)
            if not self._up[connection.node]:
                del self._up[connection.node]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.sock.close()


def _allow_many_connections() -> None:
    """Whoever leads a gathering has a link with every node: use what the system allows this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_length(connection: _Connection, line: bytes) -> None:
    """Raise ValueError where a message is too long for what its sender has to say."""
    if len(line) > (GREETING_LIMIT if connection.node is None else LINE_LIMIT):
        raise ValueError(f"a message of {len(line)} bytes")


def _begin_to_connect(address: str, port: int) -> socket.socket:
    """A connection that is about to come about. Raises OSError where it is clear already that it won't."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BlockingIOError):
            sock.connect((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
