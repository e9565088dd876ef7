"""The keeper: a thread that hears the other nodes, asks the pure decision code what to do, and does it."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any

from elastic_fit.launch.arbiter import Arbiter, ArbiterLost
from elastic_fit.launch.contact import Contact
from elastic_fit.launch.links import Links
from elastic_fit.supervisor.errors import PortTaken
from elastic_fit.supervisor.hearing import QUIET_S, statement
from elastic_fit.supervisor.membership import Fence, Move, Propose, Release, Wait, contacts, decide, next_round, release
from elastic_fit.supervisor.pulse import ListeningClock
from elastic_fit.supervisor.roster import Cause, Phase, Profile, Roster, is_earlier_start, refusal
from elastic_fit.supervisor.view import Bounds, Peer, View, is_gone

LONGEST_GAP_S = 1.0
"""A longer pause between two turns of the loop is this node's own, and does not count against its peers."""


class Keeper:
    """Keeps this node's place among the others.

    The agent's thread sets what it wants under `changed` and waits on it for `move`; everything else happens here.

    Args:
        profile: this node.
        bounds: the limits.
        arbiter: where the roster lives.
        links: the connections; the keeper's thread owns them from here on.
        is_guest: whether others have begun the job, and this node may leave it.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        profile: Profile,
        bounds: Bounds,
        arbiter: Arbiter,
        links: Links,
        *,
        listening: ListeningClock,
        is_guest: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me = profile
        self.bounds = bounds
        self.is_guest = is_guest
        self.changed = threading.Condition()
        self.move: Move = Wait(why="looking for the job")
        self.roster: Roster | None = None
        self.refused: str | None = None
        """Why this node was turned away, if it was."""
        self.told: dict[str, str] = {}
        """Names of the nodes that this one has turned away, and why."""
        # What the agent's thread sets.
        self.ready = False
        self.report: Mapping[str, Any] | None = None
        self.stop: Mapping[str, Any] | None = None
        self.leaves = False
        self.training = 0

        self._links = links
        self._listening = listening
        self._clock = clock
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self.news_r, self._news_w = os.pipe()
        os.set_blocking(self.news_r, False)
        os.set_blocking(self._news_w, False)
        links.introduce(profile)
        links.watch(self._wake_r)
        self._contact = Contact(arbiter, profile.node, bounds=bounds, notify=self.wake, clock=clock)
        self._answered_s = self._contact.answered_s
        self._heard_arbiter_s = listening.seconds
        self._proposal: tuple[int, Future[bool]] | None = None
        self._phase_key: tuple[object, ...] = ()
        self._phase_since_s = 0.0
        self._round_since_s = 0.0
        self._round_s = 0.0
        self._said: tuple[dict[str, Any] | None, float] = (None, -1e9)
        self._release: Release | None = None
        self._heard_reports: list[Mapping[str, Any]] = []
        self.failure: Exception | None = None
        """What ended the loop, if anything but `close` did."""
        self._closed = False
        self._thread = threading.Thread(target=self._guarded, name="elastic-fit-keeper", daemon=True)
        self._thread.start()

    # for the agent's thread

    def wake(self) -> None:
        """Have the loop turn now."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_w, b"\0")

    def store(self, roster: Roster, timeout_s: float) -> bool:
        """Store `roster` and wait for the answer. Raises ArbiterLost, StorageError."""
        try:
            stored = self._contact.propose(roster).result(timeout_s)
        except Late as error:
            raise ArbiterLost(f"the arbiter did not answer within {timeout_s:.0f} s") from error
        return stored

    @property
    def unanswered(self) -> str:
        """Why the arbiter did not answer the last time that it was asked; empty where it did."""
        failure = self._contact.failure
        return failure.message if failure is not None else ""

    @property
    def hears_others(self) -> bool:
        """Whether another node is connected with this one."""
        return any(self._links.is_up(node) for node in list(self._links.known))

    def close(self) -> None:
        """Leave: hang up, and take this node's counter away."""
        self._closed = True
        self.wake()
        self._thread.join(timeout=2.0)
        self._contact.close()

    def reports(self) -> list[Mapping[str, Any]]:
        """What the nodes that are here, this one first, have reported about the round that has ended."""
        with self.changed:
            ended = next_round(self.roster) - 1
            found = [*([self.report] if self.report else []), *self._heard_reports]
        return [report for report in found if report["round"] == ended]

    def enter(self, round_: int) -> None:
        """This node is about to start workers in that round; orders that speak of earlier ones are void."""
        with self.changed:
            self.take_release()
            self.training, self.ready, self.report = round_, False, None
        self.wake()

    def take_release(self) -> Release | None:
        """The order to end this node's workers that came since the last call, if any."""
        with self.changed:
            order, self._release = self._release, None
            with contextlib.suppress(BlockingIOError):
                while os.read(self.news_r, 64):
                    pass
        return order

    # the loop

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 - handed to the agent's thread, which raises it
            with self.changed:
                self.failure = error
                self.changed.notify_all()
            os.write(self._news_w, b"\0")
        finally:
            self._links.close()

    def _run(self) -> None:
        told_cause: tuple[int, Cause | None] | None = None
        while not self._closed:
            self._links.poll(self.bounds.beat_s / 2)
            self._drain()
            now = self._listening.tick(self._clock())
            if self._contact.broken is not None:
                raise self._contact.broken
            if self._contact.first_version is None:
                if now - self._heard_arbiter_s >= self.bounds.patience_s:
                    raise self._contact.failure or ArbiterLost(
                        "the arbiter of the job has never answered", hint="look at --rdzv-endpoint and who is there"
                    )
                continue
            with self.changed:
                self._note_roster(now)
                self._links.want(contacts(self.roster, self.me.node, self._away(now)))
                self._turn_away()
                self._say(now)
                self._watch_quiet(now)
                states = [known.state for known in self._links.known.values() if known.state]
                self._heard_reports = [state["report"] for state in states if state.get("report")]
                view = self._view(now)
                self.move = decide(view)
                self._act(view)
                told_cause = self._order(told_cause)
                self.changed.notify_all()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_r, 4096):
                pass

    def _note_roster(self, now: float) -> None:
        contact = self._contact
        if contact.answered_s != self._answered_s:
            self._answered_s, self._heard_arbiter_s = contact.answered_s, now
        roster = contact.roster
        if roster is None or (self.roster is not None and roster.version <= self.roster.version):
            return
        was = self.roster
        self.roster = roster
        key = (roster.round, roster.phase, roster.leader)
        if key != self._phase_key:
            self._phase_key, self._phase_since_s = key, now
        if roster.phase is Phase.RUNNING and (was is None or was.round != roster.round or was.phase != roster.phase):
            self._round_since_s = now
        elif was is not None and was.phase is Phase.RUNNING:
            self._round_s = now - self._round_since_s if was.seats(self.me.node) else 0.0
        self._said = (None, -1e9)

    def _away(self, now: float) -> list[str]:
        return [node for node in self._links.known if is_gone(self._peer(node, now), self.bounds)]

    def _peer(self, node: str, now: float) -> Peer:
        return self._links.known[node].as_peer(
            self.me.node,
            now,
            up=self._links.is_up(node),
            beat_age_s=self._contact.pulse.still_s(node, self._clock()),
            refusal=self.told.get(node),
        )

    def _view(self, now: float) -> View:
        known = self._links.known
        return View(
            me=self.me,
            bounds=self.bounds,
            roster=self.roster,
            born_version=self._contact.first_version or 0,
            phase_s=now - self._phase_since_s,
            arbiter_age_s=now - self._heard_arbiter_s,
            peers={node: self._peer(node, now) for node in known},
            ready=self.ready,
            report=self._reported(),
            stop=self.stop,
            leaves=self.leaves,
            is_guest=self.is_guest,
            lasted_s=self._round_s,
            told_version=max((peer.version for peer in known.values()), default=0),
        )

    def _reported(self) -> Cause | None:
        if self.report is None or self.report["round"] != next_round(self.roster) - 1:
            return None
        return Cause(self.report["cause"])

    def _turn_away(self) -> None:
        """Refuse, by name, who can't be part of this job. The job's members and whoever leads decide."""
        roster = self.roster
        if roster is None or not (roster.seats(self.me.node) or roster.leader == self.me.node):
            return
        for node, known in self._links.known.items():
            if roster.seats(node) or node in self.told or node == roster.leader or not self._links.is_up(node):
                continue
            why = refusal(known.profile.traits, self.me.traits)
            if why is not None:
                self.told[node] = why
                if is_earlier_start(self.me.traits, known.profile.traits):
                    continue  # it is about to take this job over
                self._links.refuse(node, f"{self.me.name} refused {known.profile.name}: {why}")

    def _say(self, now: float) -> None:
        state = statement(
            ready=next_round(self.roster) if self.ready and not self._is_seated() else None,
            report=self.report,
            version=self.roster.version if self.roster else 0,
            arbiter_age_s=now - self._heard_arbiter_s,
            known=self._links.known.values(),
            now_s=now,
            bounds=self.bounds,
        )
        news = {**state, "quiet": sorted(state["quiet"])}
        last, said_s = self._said
        if news != last or now - said_s >= self.bounds.beat_s:
            self._said = (news, now)
            self._links.say(state)

    def _is_seated(self) -> bool:
        """Whether this node is in the round that runs: its agent may wait for one still, but not for the next."""
        roster = self.roster
        return roster is not None and roster.phase is Phase.RUNNING and roster.seats(self.me.node)

    def _watch_quiet(self, now: float) -> None:
        known = self._links.known
        # A peer that is heard well needs no look at its counter: in quiet times a node reads nobody's.
        self._contact.watch(node for node, peer in known.items() if peer.refused or now - peer.heard_s > QUIET_S)
        newest = max((peer.version for peer in known.values()), default=0)
        if self.roster is None or newest > self.roster.version:
            self._contact.look()
        refused = next((peer.refusal for peer in known.values() if peer.refusal), None)
        if refused is not None and not (self.roster and self.roster.seats(self.me.node)):
            self.refused = refused

    def _act(self, view: View) -> None:
        if not isinstance(self.move, Propose) or self.refused:
            return
        roster = self.move.roster
        if self._proposal is not None:
            version, answer = self._proposal
            unanswered = not answer.done()
            if unanswered or (version == roster.version and answer.exception() is None):
                return  # on its way, or decided: the next look shows the outcome
        self._proposal = (roster.version, self._contact.propose(roster))

    def _order(self, told: tuple[int, Cause | None] | None) -> tuple[int, Cause | None] | None:
        """Pass an order to end the workers on to the agent, once for each cause."""
        if not self.training:
            return None
        move = self.move
        order = Release(cause=move.cause, why=move.why) if isinstance(move, Fence) else None
        order = order or release(self.roster, self.me.node, self.training)
        if order is None or told == (self.training, order.cause):
            return told
        self._release = order
        with contextlib.suppress(BlockingIOError):
            os.write(self._news_w, b"\0")
        return self.training, order.cause


def open_keeper(
    bounds: Bounds,
    arbiter: Arbiter,
    *,
    name: str,
    address: str,
    port: int,
    workers: int,
    traits: Mapping[str, str],
    wish: int | None = None,
    is_guest: bool = False,
) -> Keeper:
    """A keeper for this process, which listens at `port` (0: any); the rest is its `Profile`.

    Raises PortTaken where it can't listen there.
    """
    listening = ListeningClock(longest_gap_s=LONGEST_GAP_S)
    try:
        links = Links("0.0.0.0", clock=lambda: listening.tick(time.monotonic()), port=port)
    except OSError as error:
        raise PortTaken.by("port", port, error) from error
    profile = Profile(
        node=f"{name}-{os.getpid()}-{secrets.token_hex(3)}",
        name=name,
        address=address,
        port=links.port,
        workers=workers,
        wish=wish,
        traits=traits,
    )
    return Keeper(profile, bounds, arbiter, links, listening=listening, is_guest=is_guest)
