"""What a node does about the other nodes: one pure function of what it sees. No clock, no socket, no disk.

The rules, from which the rest follows:

- Whoever stores the next version of the roster has decided; everybody else reads it and follows.
- A round ends with a *gathering*: one leader, to whom every node that wants to go on connects and says that its own
  workers have ended. Only then does the leader form the next round, under the next generation.
- A later start of the same job takes the place of an earlier one, whose nodes may still run somewhere.
- A guest begins no job. It may leave, and the others go on without it.
- A false alarm does no harm beyond the time it costs: who was taken for lost but connects to the leader is in again.
- Nobody compares clocks. A peer is silent when the observer's own clock has run too long since the peer was heard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from elastic_fit.supervisor.roster import Cause, Phase, Profile, Roster, count_flaps, is_earlier_start, put_off_s, seat
from elastic_fit.supervisor.view import Bounds, Peer, View, is_gone

NAMES_TOLD = 8
"""How many names of nodes a line for people holds."""
CONTACT_SAMPLE = 8
"""How many members a node from outside tries before it takes a round for dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Store this roster if nobody has stored that version."""

    roster: Roster


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing to do but to listen."""

    why: str
    missing: tuple[str, ...] = ()
    """Names of those waited for."""

    def __str__(self) -> str:
        """For a person, in a line."""
        more = f" and {len(self.missing) - NAMES_TOLD} more" if len(self.missing) > NAMES_TOLD else ""
        return f"{self.why} {', '.join(self.missing[:NAMES_TOLD])}{more}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """All is there: this node, the leader, forms the round."""

    members: tuple[Profile, ...]
    flaps: Mapping[str, int]
    gone: tuple[str, ...]
    """Names of the members of the last round that are not in this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """This node is a member of the round that runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """This node is cut off: its workers must end; it waits and tries to come back."""

    why: str
    cause: Cause | None = None
    """As in `Release`: with LOST there is time to save, because nobody else can go on yet, or this node hears of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The job is closed."""


Move = Propose | Wait | Form | Train | Fence | End


def decide(view: View) -> Move:
    """What this node does now."""
    fence = _fence(view)
    if fence is not None:
        return fence
    roster = view.roster
    if roster is None:
        if view.is_guest:
            return Wait(why="nobody has begun the job")
        return Propose(roster=_opening(view, version=1, round_=1, generation=0))
    if roster.phase is Phase.CLOSED:
        if roster.version > view.born_version or view.is_guest:
            return End()
        return Propose(roster=_opening(view, roster.version + 1, roster.round + 1, roster.generation))
    if roster.leading is not None and is_earlier_start(roster.leading.traits, view.me.traits):
        return Propose(roster=_opening(view, roster.version + 1, roster.round + 1, roster.generation))
    if roster.phase is Phase.GATHERING:
        return _gather(view, roster)
    return _run(view, roster)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """This node's workers must end."""

    cause: Cause | None
    """How, see `Cause`; None is at once, because nothing they write counts any more."""
    why: str = ""
    """Where that isn't the roster's to say."""


def release(roster: Roster | None, me: str, training: int) -> Release | None:
    """Whether the workers that this node has in round `training` must end, as the roster has it."""
    if roster is None or (roster.phase is Phase.RUNNING and roster.round == training and roster.seats(me)):
        return None
    if roster.phase is Phase.GATHERING and roster.round == training + 1 and roster.seats(me):
        return Release(cause=roster.cause)
    return Release(cause=None)


def linked(rank: int, size: int) -> frozenset[int]:
    """The ranks that a member keeps a link with: those 1, 2, 4, ... away, both ways round.

    Every loss has a linked witness, and news crosses the whole job in log2(size) hops.
    """
    steps = [1 << power for power in range((size - 1).bit_length())]
    return frozenset((rank + sign * step) % size for step in steps for sign in (1, -1)) - {rank}


def next_round(roster: Roster | None) -> int:
    """The round that a node without workers is ready for, going by the roster it knows."""
    if roster is None:
        return 1
    return roster.round if roster.phase is Phase.GATHERING else roster.round + 1


def contacts(roster: Roster | None, me: str, gone: Iterable[str] = ()) -> tuple[Profile, ...]:
    """The nodes that `me` should have a link with."""
    if roster is None or roster.phase is Phase.CLOSED:
        return ()
    wanted: dict[str, Profile] = {}
    if roster.phase is Phase.GATHERING and roster.leading is not None:
        wanted[roster.leader] = roster.leading
    if roster.seats(me):
        for rank in linked(roster.rank(me), len(roster.members)):
            wanted[roster.members[rank].node] = roster.members[rank]
    elif roster.phase is Phase.RUNNING:
        wanted.update((member.node, member) for member in _doors(roster, gone))
    wanted.pop(me, None)
    return tuple(wanted.values())


def _doors(roster: Roster, gone: Iterable[str] = ()) -> list[Profile]:
    """Where a node from outside knocks: at the leader's, and one after another at others' as those before are gone."""
    away = set(gone)
    order = sorted(roster.members, key=lambda member: member.node != roster.leader)[:CONTACT_SAMPLE]
    tried = sum(1 for _ in takewhile(lambda member: member.node in away, order))
    return order[: tried + 1]


def _fence(view: View) -> Fence | None:
    """Whether this node must stop since the arbiter is out of its reach, and not simply down for all that it hears.

    While a round's nodes all hear one another, no other round can form behind the back of one: whoever wanted to would
    have to miss it first. So an outage is nobody's loss, and where it may become one there is time to save. A node that
    trains alone has nobody who would tell it whether the others reach the arbiter: it saves at once.
    """
    bounds, roster = view.bounds, view.roster
    if view.arbiter_age_s < bounds.fence_s:
        return None
    why = "the arbiter of the job can't be reached"
    is_told_of_more = roster is not None and view.told_version > roster.version
    if roster is not None and _trains_alone(view, roster) and not is_told_of_more:
        return Fence(why=why, cause=Cause.LOST if view.arbiter_age_s < bounds.takeover_s else None)
    near = [peer for peer in view.peers.values() if roster is not None and roster.seats(peer.profile.node)]
    if roster is None or not near or is_told_of_more:
        return Fence(why=why)
    if any(peer.quiet_s >= bounds.fence_s for peer in near) or view.arbiter_age_s >= bounds.takeover_s:
        return Fence(why=why)
    lost = next((peer.profile.name for peer in near if not peer.up or peer.quiet_s >= bounds.doubt_s), None)
    if lost is not None:
        return Fence(why=f"{why}, nor can {lost}", cause=Cause.LOST)
    # An arbiter that is back is not back for all in the same moment: it counts from when somebody reaches it.
    is_mine = any(min(view.arbiter_age_s, peer.reaches_arbiter_s) >= 2 * bounds.silence_s for peer in near)
    return Fence(why=why, cause=Cause.LOST) if is_mine or view.arbiter_age_s >= bounds.outage_s else None


def _trains_alone(view: View, roster: Roster) -> bool:
    return roster.phase is Phase.RUNNING and list(roster.ranks) == [view.me.node]


def _opening(view: View, version: int, round_: int, generation: int) -> Roster:
    return Roster(
        version=version,
        phase=Phase.GATHERING,
        round=round_,
        generation=generation,
        leader=view.me.node,
        leading=view.me,
    )


def _call(view: View, roster: Roster, cause: Cause, lost: Iterable[str] = ()) -> Propose:
    """End the running round: a gathering that this node leads."""
    proposal = roster.after(
        phase=Phase.GATHERING,
        leader=view.me.node,
        leading=view.me,
        cause=cause,
        lost=tuple(lost),
        note=dict(view.stop or {}),
        round=roster.round + 1,
    )
    return Propose(roster=proposal)


def _gone_members(view: View, roster: Roster) -> list[str]:
    """Linked members that this node misses and that are not given up yet."""
    return [
        peer.profile.node
        for peer in view.peers.values()
        if roster.seats(peer.profile.node) and peer.profile.node not in roster.lost and is_gone(peer, view.bounds)
    ]


def _run(view: View, roster: Roster) -> Move:
    if not roster.seats(view.me.node):
        return _knock(view, roster)
    gone = _gone_members(view, roster)
    if gone:
        longest = max(view.peers[node].quiet_s for node in gone)
        refused = all(view.peers[node].refused for node in gone)
        if refused or longest >= view.bounds.silence_s + _hesitation_s(view, roster, gone):
            return _call(view, roster, Cause.LOST, gone)
    if view.report is not None:
        return _call(view, roster, view.report)
    if view.stop is not None:
        return _call(view, roster, Cause.STOP)
    if view.leaves:
        return _call(view, roster, Cause.LEAVE, [view.me.node])
    if len(roster.members) < view.bounds.most and _newcomers_due(view, roster):
        return _call(view, roster, Cause.JOIN)
    return Train()


def _hesitation_s(view: View, roster: Roster, gone: list[str]) -> float:
    """How much longer a member that misses many waits before it accuses: the larger side of a cut goes first."""
    bounds = view.bounds
    soon_s = bounds.fence_s - bounds.beat_s
    linked_members = [peer for node, peer in view.peers.items() if roster.seats(node)]
    # Those included that are about to be missed.
    quiet = sum(peer.quiet_s >= soon_s for peer in linked_members)
    share = max(len(gone), quiet) / len(linked_members)
    # Who is cut off rather than dead still counts in the arbiter, and will decide without this node.
    beats = [view.peers[node].beat_age_s for node in gone]
    alive = sum(age is not None and age < bounds.silence_s for age in beats)
    is_smaller_side = 2 * alive > len(linked_members) + 1
    return bounds.hesitation_s * (share**2 + (2 if is_smaller_side else 0))


def _newcomers_due(view: View, roster: Roster) -> bool:
    waiting = [peer.waited_s for peer in _newcomers(view, roster)]
    outside = [peer for node, peer in view.peers.items() if not roster.seats(node)]
    is_more_to_come = any(_gets_ready(peer, view.bounds) for peer in outside)
    return bool(waiting) and max(waiting) >= (view.bounds.warming_s if is_more_to_come else view.bounds.join_s)


def _gets_ready(peer: Peer, bounds: Bounds) -> bool:
    """Whether it is here, and still imports."""
    return peer.up and peer.refusal is None and peer.ready_for is None and not is_gone(peer, bounds)


def _newcomers(view: View, roster: Roster) -> list[Peer]:
    """Those outside who may come in, in order of arrival."""
    found = [
        peer
        for peer in view.peers.values()
        if not roster.seats(peer.profile.node)
        and peer.is_ready(next_round(roster))
        and not is_gone(peer, view.bounds)
        and peer.waited_s >= put_off_s(roster.flaps.get(peer.profile.name, 0))
    ]
    return sorted(found, key=lambda peer: (-peer.waited_s, peer.profile.node))


def _knock(view: View, roster: Roster) -> Move:
    """A round runs without this node: be let in, or find out that nobody is left in it."""
    doors = [view.peers.get(member.node) for member in _doors(roster, _away(view))]
    if doors and all(peer is not None and _is_dead(peer, view.bounds, view.bounds.takeover_s) for peer in doors):
        return _call(view, roster, Cause.START, [member.node for member in roster.members])
    if any(peer is not None and peer.up and not is_gone(peer, view.bounds) for peer in doors):
        return Wait(why=_why_outside(view, roster))
    if view.phase_s >= view.bounds.silence_s:
        why = "the job runs, and none of its nodes can be reached from here"
        return Fence(
            why=f"{why}; it goes on without them once they have given no sign for {view.bounds.takeover_s:.0f} s"
        )
    return Wait(why="looking for the job's nodes")


def _why_outside(view: View, roster: Roster) -> str:
    if len(roster.members) >= view.bounds.most:
        return f"a spare: all {view.bounds.most} places are taken"
    flaps = roster.flaps.get(view.me.name, 0)
    if put_off_s(flaps):
        return f"put off for {put_off_s(flaps):.0f} s: {view.me.name} was lost {flaps} times soon after it had come"
    return "waiting to be let in"


def _nodes(count: int) -> str:
    return "1 node is" if count == 1 else f"{count} nodes are"


def _away(view: View) -> list[str]:
    return [node for node, peer in view.peers.items() if is_gone(peer, view.bounds)]


def _is_dead(peer: Peer, bounds: Bounds, still_s: float) -> bool:
    """Gone, and not only out of this node's reach: what it leaves in the arbiter has stood still for `still_s`."""
    if not is_gone(peer, bounds):
        return False
    return peer.refused or (peer.beat_age_s is not None and peer.beat_age_s >= still_s)


def _gather(view: View, roster: Roster) -> Move:
    graver = _graver(view, roster)
    if graver is not None:
        return graver
    if roster.leader == view.me.node:
        return _lead(view, roster)
    leader = view.peers.get(roster.leader)
    if leader is None or not is_gone(leader, view.bounds):
        return Wait(why="the nodes gather with", missing=(roster.leading.name if roster.leading else roster.leader,))
    if _is_dead(leader, view.bounds, view.bounds.silence_s):
        return _take_over(view, roster)
    # Its next round may begin without this node, but what is saved here until then counts.
    return Fence(why=f"{leader.profile.name} gathers the nodes and can't be reached from here", cause=Cause.LOST)


def _take_over(view: View, roster: Roster) -> Propose:
    """Lead the gathering in place of a leader that is gone: if it was a member and has not said goodbye, it is lost."""
    lost = tuple(dict.fromkeys((*roster.lost, roster.leader)))
    is_loss = roster.seats(roster.leader) and roster.leader not in roster.lost
    cause = max(roster.cause, Cause.LOST) if is_loss else roster.cause
    return Propose(roster=roster.after(leader=view.me.node, leading=view.me, cause=cause, lost=lost))


def _graver(view: View, roster: Roster) -> Propose | None:
    """The gathering's cause has grown: workers that were left to end in peace must be told. Or the job is to stop."""
    if not roster.seats(view.me.node):
        return None
    gone = _gone_members(view, roster)
    cause = max(
        roster.cause,
        view.report if view.report is not None else roster.cause,
        Cause.LOST if gone else roster.cause,
        Cause.STOP if view.stop is not None else roster.cause,
    )
    note = roster.note or dict(view.stop or {})
    # A leader that can't be reached is the others' business as well: they take over, see `_gather`.
    says_goodbye = view.leaves and view.me.node not in roster.lost
    if (cause is roster.cause and note == roster.note and not says_goodbye) or gone == [roster.leader]:
        return None
    lost = dict.fromkeys((*roster.lost, *gone, *([view.me.node] if says_goodbye else ())))
    return Propose(roster=roster.after(cause=cause, note=note, lost=tuple(lost)))


def _lead(view: View, roster: Roster) -> Move:
    bounds = view.bounds
    missing = [member.name for member in roster.members if _is_awaited(view, roster, member)]
    if not view.ready:
        missing.append(view.me.name)
    if roster.cause is Cause.START:
        missing += [peer.profile.name for peer in view.peers.values() if _gets_ready(peer, bounds)]
    if missing:
        return Wait(why="waiting for" if roster.members else "getting ready:", missing=tuple(missing))
    old = {member.node for member in roster.members}
    here = [peer for peer in view.peers.values() if peer.is_ready(roster.round) and not is_gone(peer, bounds)]
    back = [peer.profile for peer in here if peer.profile.node in old]
    newcomers = _newcomers(view, roster)
    present = [view.me, *back, *(peer.profile for peer in newcomers)]
    if len(present) < bounds.least:
        present += [peer.profile for peer in _put_off(view, roster)]
    # A job that is to stop waits for nobody: those who are here close it.
    if len(present) < bounds.least and not roster.note:
        return _wait_for_minimum(view, roster, len(present))
    latest = min((peer.waited_s for peer in newcomers), default=view.phase_s)
    if roster.cause is Cause.START and len(present) < bounds.most and min(latest, view.phase_s) < bounds.gather_s:
        return Wait(why=f"{_nodes(len(present))} here, others may come")
    members = seat(roster.members, present, bounds.most)
    if all(member.node != view.me.node for member in members):
        members = (*members[:-1], view.me)  # the leader serves the round's store: it has a seat
    seated = {member.node for member in members}
    gone = tuple(member.name for member in roster.members if member.node not in seated)
    lost = () if roster.cause is Cause.LEAVE else gone
    flaps = count_flaps(roster.flaps, lost, lasted_s=view.lasted_s, settled_s=bounds.settled_s)
    return Form(members=members, flaps=flaps, gone=gone)


def _is_awaited(view: View, roster: Roster, member: Profile) -> bool:
    """Whether the leader waits for this member of the last round."""
    if member.node == view.me.node:
        return False
    peer = view.peers.get(member.node)
    if peer is not None and (peer.is_ready(roster.round) or is_gone(peer, view.bounds)):
        return False
    if peer is not None and peer.up:
        return True
    return member.node not in roster.lost and view.phase_s < view.bounds.silence_s


def _put_off(view: View, roster: Roster) -> list[Peer]:
    """Nodes that are put off for coming and going: better than standing still below the minimum."""
    taken = {peer.profile.node for peer in _newcomers(view, roster)}
    return [
        peer
        for peer in view.peers.values()
        if peer.is_ready(roster.round)
        and not is_gone(peer, view.bounds)
        and not roster.seats(peer.profile.node)
        and peer.profile.node not in taken
    ]


def _wait_for_minimum(view: View, roster: Roster, present: int) -> Move:
    bounds = view.bounds
    if view.phase_s >= bounds.patience_s:
        why = f"{present} of at least {bounds.least} nodes came within {bounds.patience_s:.0f} s"
        return Propose(roster=roster.after(phase=Phase.CLOSED, decision={"status": 1, "why": why}))
    left = bounds.patience_s - view.phase_s
    return Wait(why=f"{present} of at least {bounds.least} nodes are here; giving up in {left:.0f} s")
