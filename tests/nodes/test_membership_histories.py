"""Histories against the decision code: whatever comes, there is one leader, one world, and progress in the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_fit.supervisor.roster import Cause, Phase
from elastic_fit.supervisor.view import Bounds
from tests.nodes.simulation import Host, World
from tests.nodes.witness import Witness

NAMES = ("h1", "h2", "h3", "h4", "h5")
LEADER = "the leader"
"""Whoever gathers the nodes, in the midst of it: what happens to it there is what others have to take over from."""


def formed(least: int, most: int, names: tuple[str, ...], **options: object) -> World:
    world = World(Bounds(least=least, most=most), check=Witness(), **options)  # type: ignore[arg-type]
    for name in names:
        world.add(name)
    world.run_until(lambda w: w.trains_with(min(most, len(names))), 30)
    return world


def test_nodes_that_start_together_form_one_world() -> None:
    world = formed(1, 4, NAMES[:4])
    assert len([r for r in world.cell.history if r.phase is Phase.RUNNING]) == 1


def test_fewer_than_the_minimum_never_train_and_the_missing_node_starts_them() -> None:
    world = World(Bounds(least=3, most=4), check=Witness())
    world.add("h1")
    world.add("h2")
    world.run(60)
    assert not any(host.training for host in world.living())
    world.add("h3")
    world.run_until(lambda w: w.trains_with(3), 15)


def test_the_minimum_never_comes_and_the_job_ends_with_a_reason() -> None:
    world = World(Bounds(least=2, most=2, patience_s=20))
    host = world.add("h1")
    world.run(30)
    assert not host.alive
    assert "1 of at least 2 nodes" in world.cell.history[-1].decision["why"]


def test_first_node_dies_and_the_others_go_on() -> None:
    world = formed(1, 4, NAMES[:3])
    first = world.hosts[world.cell.history[-1].members[0].node]
    world.kill(first)
    assert world.run_until(lambda w: w.trains_with(2), 30) < 5


def test_survivors_keep_their_ranks() -> None:
    world = formed(1, 4, NAMES[:4])
    before = [member.node for member in world.cell.history[-1].members]
    world.kill(world.hosts[before[1]])
    world.run_until(lambda w: w.trains_with(3), 30)
    after = [member.node for member in world.cell.history[-1].members]
    assert after == [before[0], before[3], before[2]]


def test_silent_node_is_noticed_within_five_seconds_and_comes_back_when_it_is_heard_again() -> None:
    world = formed(1, 4, NAMES[:3])
    victim = world.named("h3")
    assert victim is not None
    victim.paused = True
    assert world.run_until(lambda w: w.cell.history[-1].phase is Phase.GATHERING, 30) <= 5.5
    world.run_until(lambda w: w.trains_with(2), 30)
    victim.paused = False
    world.run_until(lambda w: w.trains_with(3), 30)


def test_two_newcomers_at_once_cause_one_change() -> None:
    world = formed(1, 4, NAMES[:2])
    rounds = world.cell.history[-1].round
    world.add("h3")
    world.add("h4")
    world.run_until(lambda w: w.trains_with(4), 30)
    assert world.cell.history[-1].round == rounds + 1


def test_newcomer_that_is_ready_waits_for_one_that_still_imports_but_not_for_long() -> None:
    for imports_s, worlds in ((3.0, [2, 4]), (12.0, [2, 3, 4])):
        world = formed(1, 4, NAMES[:2])
        world.add("h3")
        world.add("h4").warm_at = world.now + imports_s
        world.run_until(lambda w: w.trains_with(4), 60)
        assert [len(roster.members) for roster in world.cell.history if roster.phase is Phase.RUNNING] == worlds


def test_spare_takes_the_seat_of_a_lost_node() -> None:
    world = formed(2, 2, NAMES[:3])
    seated = world.hosts[world.cell.history[-1].members[1].node]
    world.kill(seated)
    world.run_until(lambda w: w.trains_with(2), 30)


def test_larger_side_of_a_cut_goes_on_and_the_other_waits_until_it_heals() -> None:
    world = formed(1, 4, NAMES[:3])
    world.wires.cut = {frozenset(("h3", "h1")), frozenset(("h3", "h2"))}
    world.run_until(lambda w: w.trains_with(2), 30)
    assert {member.name for member in world.cell.history[-1].members} == {"h1", "h2"}
    world.run(20)
    cut_off = world.named("h3")
    assert cut_off is not None
    assert not cut_off.training
    world.wires.cut.clear()
    world.run_until(lambda w: w.trains_with(3), 30)


def test_node_that_sees_neither_peers_nor_the_arbiter_stops_before_the_others_go_on() -> None:
    world = formed(1, 4, NAMES[:3])
    alone = world.named("h1")
    assert alone is not None
    world.wires.cut = {frozenset(("h1", "h2")), frozenset(("h1", "h3"))}
    world.blind.add(alone.node)
    world.run_until(lambda w: w.trains_with(2), 30)
    assert not alone.training


def test_arbiter_that_is_down_for_everybody_stops_nobody() -> None:
    world = formed(1, 4, NAMES[:3])
    world.blind = {host.node for host in world.living()}
    world.run(50)
    assert world.trains_with(3)
    world.blind.clear()
    world.kill(world.living()[0])
    world.run_until(lambda w: w.trains_with(2), 30)


def test_arbiter_that_is_back_for_one_before_the_other_stops_nobody() -> None:
    def all_train(world: World) -> None:
        assert world.trains_with(3)

    world = formed(1, 4, NAMES[:3])
    nodes = {host.node for host in world.living()}
    world.blind = set(nodes)
    world.run(50, all_train)
    world.blind.remove(min(nodes))
    world.run(5, all_train)
    world.blind.clear()
    world.run(30, all_train)


def test_node_that_trains_alone_and_loses_sight_of_the_arbiter_saves_before_it_ends() -> None:
    for seed in range(10):
        world = formed(1, 4, NAMES[:1], seed=seed)
        alone, before = world.living()[0], world.cell.history[-1].generation
        world.blind.add(alone.node)
        world.run_until(lambda w, alone=alone: not alone.training, 6)
        assert world.shelf.best() == world.reached[before]
        world.blind.clear()
        world.run_until(lambda w: w.trains_with(1), 15)
        assert world.cell.history[-1].decision["resume"] == world.reached[before], "no step is done twice"


def test_round_that_cannot_reach_the_arbiter_has_ended_before_a_spare_that_can_begins_one() -> None:
    world = formed(1, 2, NAMES[:3])
    members = [world.hosts[member.node] for member in world.cell.history[-1].members]
    spare = next(host for host in world.living() if host not in members)
    world.blind = {member.node for member in members}
    world.wires.cut = {frozenset((spare.profile.name, member.profile.name)) for member in members}

    def one_side_trains(world: World) -> None:
        assert not (spare.training and any(member.training for member in members))

    world.run_until(lambda w: not any(member.training for member in members), 70)
    assert world.run_until(lambda w: bool(spare.training), 80) > 30
    world.run(60, one_side_trains)
    world.blind.clear()
    world.wires.cut.clear()
    world.run_until(lambda w: w.trains_with(2), 60)


def test_all_nodes_die_at_once_and_the_job_is_started_again() -> None:
    for count in (2, 3, 4):
        world = formed(1, 4, NAMES[:count])
        for host in world.living():
            world.kill(host)
        for name in NAMES[:count]:
            world.add(name)
        assert world.run_until(lambda w, count=count: w.trains_with(count), 60) < 10


def test_all_hosts_are_lost_without_a_trace_and_others_go_on_with_the_job_later() -> None:
    world = formed(1, 4, NAMES[:2])
    for host in world.living():
        world.kill(host)
    world.wires.cut = {frozenset((old, new)) for old in NAMES[:2] for new in NAMES[2:4]}
    world.add("h3")
    world.add("h4")
    assert world.run_until(lambda w: w.trains_with(2), 200) >= world.bounds.takeover_s


def test_node_that_is_rejected_by_the_others_and_blind_takes_no_step_beside_them() -> None:
    for seed in range(30):
        world = formed(1, 4, NAMES[:3], seed=seed)
        alone = world.named("h1")
        assert alone is not None
        world.blind.add(alone.node)
        world.run(4)
        world.wires.rejecting = {frozenset(("h1", "h2")), frozenset(("h1", "h3"))}

        def ends_first(world: World, alone: Host = alone) -> None:
            assert not world.trains_with(2) or alone.workers.ending_at is not None or not alone.training

        world.run(10, ends_first)
        assert world.trains_with(2)


def test_host_that_freezes_while_the_job_gathers_for_its_start_keeps_nobody_waiting() -> None:
    world = World(Bounds(least=1, most=4), check=Witness())
    for name in NAMES[:3]:
        world.add(name).warm_at = 3.0
    world.run(2)
    frozen = world.named("h3")
    assert frozen is not None
    frozen.paused = True
    world.run_until(lambda w: w.trains_with(2), 30)


def test_node_that_alone_cannot_reach_the_arbiter_is_fenced_off_though_all_hear_it() -> None:
    world = formed(1, 4, NAMES[:3])
    alone = world.named("h1")
    assert alone is not None
    world.blind.add(alone.node)
    world.run_until(lambda w: not alone.training, 10)


def test_node_that_comes_and_goes_is_put_off_and_the_others_train_meanwhile() -> None:
    world = formed(1, 4, NAMES[:2])
    for _ in range(3):
        flapping = world.add("h3")
        world.run_until(lambda w: w.trains_with(3), 60)
        world.kill(flapping)
        world.run_until(lambda w: w.trains_with(2), 60)
    world.add("h3")
    assert world.run_until(lambda w: w.trains_with(3), 60) > 9


@pytest.mark.parametrize("how", ["kill", "pause", "isolate"])
@pytest.mark.parametrize("who", [LEADER, "another member"])
def test_member_that_is_gone_while_the_nodes_gather_for_a_newcomer_costs_no_step(who: str, how: str) -> None:
    for seed in range(5):
        world = formed(1, 4, NAMES[:3], seed=seed)
        world.add("h4")
        world.run_until(lambda w: w.cell.history[-1].phase is Phase.GATHERING, 10)
        gathering = world.cell.history[-1]
        assert gathering.cause is Cause.JOIN
        others = [world.hosts[node] for node in gathering.ranks if node != gathering.leader]
        gone = world.hosts[gathering.leader] if who is LEADER else others[0]
        apply(world, (how, gone.profile.name, "h5", 0.0))
        # Who is merely cut off may be the side that goes on.
        seconds = world.run_until(lambda w, next_=gathering.round: any(r.round == next_ for r in w.at_work()), 15)
        assert seconds < 10
        assert world.cell.history[-1].decision["resume"] == world.reached[gathering.generation]


def test_leader_that_has_no_link_with_all_members_waits_for_them_but_not_for_the_dead() -> None:
    names = tuple(f"h{number}" for number in range(1, 9))
    for seed in range(5):
        world = formed(1, 8, names, seed=seed)
        world.living()[seed].fail()
        world.run_until(lambda w: w.cell.history[-1].phase is Phase.GATHERING, 10)
        world.run_until(lambda w: w.cell.history[-1].phase is Phase.RUNNING, 10)
        assert len(world.cell.history[-1].members) == 8
        for host in world.living()[seed : seed + 3]:
            world.kill(host)
        assert world.run_until(lambda w: w.trains_with(5), 30) < 15


def test_spare_that_took_over_has_a_seat_also_where_all_members_are_back() -> None:
    world = formed(2, 2, NAMES[:3])
    members = [world.hosts[node] for node in world.cell.history[-1].ranks]
    spare = next(host for host in world.living() if host not in members)
    for member in members:
        member.paused = True
    world.run_until(lambda w: w.cell.history[-1].leader == spare.node, 150)
    for member in members:
        member.paused = False
    world.run_until(lambda w: w.cell.history[-1].phase is Phase.RUNNING and w.trains_with(2), 30)
    assert world.cell.history[-1].seats(spare.node)


def test_save_that_takes_long_is_waited_for_and_costs_no_step() -> None:
    for seed in range(5):
        world = formed(1, 4, NAMES[:3], seed=seed, hanging=1.0)
        before = world.cell.history[-1].generation
        world.add("h4")
        world.run_until(lambda w: w.trains_with(4), 40)
        assert world.cell.history[-1].decision["resume"] == world.reached[before]


def test_failed_worker_ends_the_round_for_all_and_all_come_back() -> None:
    world = formed(1, 4, NAMES[:3])
    before = world.cell.history[-1]
    world.living()[1].fail()
    world.run_until(lambda w: w.cell.history[-1].round > before.round and w.trains_with(3), 30)
    assert world.cell.history[-1].members == before.members


def test_guest_that_comes_first_begins_no_job() -> None:
    world = World(Bounds(least=1, most=4), check=Witness())
    world.add("h1", is_guest=True)
    world.run(60)
    assert world.cell.history == []
    world.add("h2")
    world.run_until(lambda w: w.trains_with(2), 15)


def test_guests_that_leave_end_with_the_others_and_have_not_been_lost() -> None:
    world = formed(1, 4, NAMES[:2])
    for _ in range(2):
        guests = [world.add(name, is_guest=True) for name in ("h3", "h4")]
        world.run_until(lambda w: w.trains_with(4), 30)
        for guest in guests:
            guest.leaves = True
        assert world.run_until(lambda w: w.trains_with(2), 30) < 5
        gathering = next(roster for roster in reversed(world.cell.history) if roster.phase is Phase.GATHERING)
        assert gathering.cause is Cause.LEAVE
        assert set(gathering.lost) == {guest.node for guest in guests}
    assert world.cell.history[-1].flaps == {}


def test_what_an_earlier_connection_delivers_late_alarms_nobody() -> None:
    world = formed(1, 4, NAMES[:2])
    first, second = world.living()
    for host in (first, second):
        cut = world.now
        world.wires.cut = {frozenset(("h1", "h2"))}
        world.run(20)  # long enough to be missed, and to say so into the connection that nothing passes on
        world.wires.cut.clear()
        world.run_until(lambda w: w.trains_with(2), 60)
        round_ = world.cell.history[-1].round
        host.hear_late(second if host is first else first, world.now - cut - 19)
        world.run(10)
        assert world.cell.history[-1].round == round_, "a message of long ago has ended a round"


def test_connection_that_breaks_and_is_made_again_costs_nothing() -> None:
    world = formed(1, 4, NAMES[:3])
    for _ in range(20):
        world.wires.break_("h1", "h2", world.now)
        world.run(1)
    assert [r.phase for r in world.cell.history].count(Phase.RUNNING) == 1


def test_messages_that_take_two_seconds_and_come_twice_delay_the_news_and_alarm_nobody() -> None:
    world = formed(1, 4, NAMES[:3])
    world.wires.lags = {(a, b): (0.5, 2.0) for a in NAMES for b in NAMES if a != b}
    world.run(30)
    assert [r.phase for r in world.cell.history].count(Phase.RUNNING) == 1
    world.kill(world.living()[0])
    assert world.run_until(lambda w: w.trains_with(2), 30) < 10


def test_folder_that_shows_a_node_what_was_there_half_a_minute_ago_keeps_it_from_deciding_alone() -> None:
    world = formed(1, 4, NAMES[:3])
    late = world.named("h3")
    assert late is not None
    world.staleness[late.node] = 30.0
    world.wires.cut = {frozenset(("h3", "h1")), frozenset(("h3", "h2"))}
    world.run_until(lambda w: w.trains_with(2), 30)
    world.run_until(lambda w: not late.training, 15)  # its own proposal was answered: it has seen what was decided
    world.mend()
    world.run_until(lambda w: w.trains_with(3), 60)


def test_leader_that_often_does_not_hear_what_became_of_its_decisions_forms_the_round_all_the_same() -> None:
    world = formed(1, 4, NAMES[:3], lossiness=0.6)
    for _ in range(5):
        world.living()[0].fail()
        world.run_until(lambda w: not w.at_work(), 5)
        world.run_until(lambda w: w.trains_with(3), 120)


KINDS = (
    *("kill", "start", "guest", "leave", "pause", "wake", "fail"),
    *("isolate", "part", "cut", "mute", "heal", "break", "delay", "double", "late"),
    *("blind", "see", "stale"),
)
BRIEF = Bounds(least=1, most=4, outage_s=10.0, patience_s=1e9)
"""Outages that nodes train through are short, so that what follows from longer ones comes into reach."""
EVENT = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from((*NAMES, LEADER, LEADER)),
    st.sampled_from(NAMES),
    st.floats(min_value=0.0, max_value=8.0)
    | st.sampled_from((0.0, BRIEF.fence_s, BRIEF.silence_s, 2 * BRIEF.takeover_s)),
)


def apply(world: World, event: tuple[str, str, str, float]) -> None:
    kind, name, other, seconds = event
    if name == LEADER:
        name = gathering_leader(world)
    host = world.named(name)
    if kind == "start" and host is None:
        world.add(name)
    elif kind == "guest" and host is None:
        world.add(name, is_guest=True).warm_at = world.now + seconds
    elif host is not None and kind in ("kill", "blind", "see", "stale", "pause", "wake", "fail", "leave"):
        happen_to(world, host, kind, seconds)
    elif kind == "isolate":
        world.wires.cut |= {frozenset((name, peer)) for peer in NAMES if peer != name}
    elif kind == "part":  # of two sides that don't hear one another, one doesn't see the arbiter either
        part(world, NAMES[: NAMES.index(name) + 1], NAMES[NAMES.index(name) + 1 :], blinds_first=name < other)
    elif kind == "heal":
        world.wires.cut = {pair for pair in world.wires.cut if name not in pair}
        world.wires.mute = {way for way in world.wires.mute if name not in way}
    elif name != other:
        happen_between(world, name, other, kind, seconds)


def gathering_leader(world: World) -> str:
    """The name of the host that gathers the nodes; where none does, a worker fails, and one will."""
    training = [host for host in world.living() if host.training]
    if training and world.cell.history[-1].phase is Phase.RUNNING:
        world.random.choice(training).fail()
    for _ in range(round(2 * BRIEF.fence_s / world.tick_s)):
        roster = world.cell.history[-1] if world.cell.history else None
        if roster is not None and roster.phase is Phase.GATHERING and roster.leading is not None:
            world.run(world.random.uniform(0.0, 2.0))
            return roster.leading.name
        world.step()
    return NAMES[0]


def part(world: World, first: tuple[str, ...], second: tuple[str, ...], *, blinds_first: bool) -> None:
    world.wires.cut |= {frozenset((one, other)) for one in first for other in second}
    blinded, seeing = (first, second) if blinds_first else (second, first)
    world.blind |= {host.node for host in world.living() if host.profile.name in blinded}
    if seeing and not any(world.named(name) for name in seeing):
        world.add(seeing[0])


def happen_to(world: World, host: Host, kind: str, seconds: float) -> None:
    if kind == "kill":
        world.kill(host)
    elif kind == "blind":
        world.blind.add(host.node)
    elif kind == "see":
        world.blind.discard(host.node)
        world.staleness.pop(host.node, None)
    elif kind == "stale":
        world.staleness[host.node] = 4 * seconds
    elif kind == "pause":
        host.paused = True
    elif kind == "wake":
        host.paused = False
    elif kind == "fail":
        host.fail()
    elif kind == "leave":
        host.leaves = True


def happen_between(world: World, name: str, other: str, kind: str, seconds: float) -> None:
    wires = world.wires
    if kind == "cut":
        wires.cut.add(frozenset((name, other)))
    elif kind == "mute":
        wires.mute.add((name, other))
    elif kind == "break":
        wires.break_(name, other, world.now)
    elif kind == "delay":
        wires.lags[name, other] = (seconds,)
    elif kind == "double":  # a connection beside a slow one: all comes twice, and what is old comes last
        wires.lags[name, other] = (0.0, seconds)
    elif kind == "late":
        sender, receiver = world.named(name), world.named(other)
        if sender is not None and receiver is not None:
            receiver.hear_late(sender, 4 * seconds)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    events=st.lists(EVENT, max_size=12),
    least=st.integers(1, 3),
    seed=st.integers(0, 1000),
    slowness=st.sampled_from((0.0, 0.3, 0.6)),
    lossiness=st.sampled_from((0.0, 0.3)),
    hanging=st.sampled_from((0.0, 0.3)),
    is_in_etcd=st.booleans(),
)
def test_whatever_happens_there_is_one_world_and_progress_once_it_is_over(
    events: list[tuple[str, str, str, float]], least: int, seed: int, **chances: float
) -> None:
    world = World(replace(BRIEF, least=least), seed=seed, check=Witness(), **chances)  # type: ignore[arg-type]
    for name in NAMES[:3]:
        world.add(name)
    world.run(4)
    for event in events:
        apply(world, event)
        world.run(event[3])
    world.mend()
    stays = {host.profile.name for host in world.living() if not host.leaves}
    for name in sorted(set(NAMES[:3]) - stays):
        world.add(name)
    # The longest put-off that twelve events can earn, and then some.
    world.run_until(lambda w: w.trains_with(min(4, sum(not host.leaves for host in w.living()))), 400)
    generation = world.cell.history[-1].generation
    world.run_until(lambda w: w.shelf.commits[-1:] and w.shelf.commits[-1].generation >= generation, 60)
