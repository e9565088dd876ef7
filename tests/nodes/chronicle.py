"""What may follow what: the rules that each version of the roster keeps, whoever has stored it."""

from __future__ import annotations

from elastic_fit.supervisor.roster import Phase, Roster
from elastic_fit.supervisor.view import Bounds


def check_successor(before: Roster | None, after: Roster, bounds: Bounds) -> None:
    """AssertionError where `after` must not follow `before`."""
    told = f"{after} follows {before}"
    assert after.version == (before.version if before is not None else 0) + 1, told
    if before is None or before.phase is Phase.CLOSED:
        assert after.phase is Phase.GATHERING, told
        assert after.round == (before.round if before is not None else 0) + 1, told
        assert after.generation == (before.generation if before is not None else 0), told
    elif before.phase is Phase.RUNNING:
        _check_call(before, after, told)
    elif after.phase is Phase.GATHERING:
        _check_gathering(before, after, told)
    elif after.phase is Phase.RUNNING:
        _check_formed(before, after, bounds, told)
    if after.phase is Phase.GATHERING:
        assert after.leading is not None, told
        assert after.leading.node == after.leader, told
        # A leader that leaves says so: the others go on without it. Who was taken for lost before may be back.
        newly_lost = set(after.lost) - set(before.lost if before is not None else ())
        assert after.leader not in newly_lost or after.seats(after.leader), told


def _check_call(before: Roster, after: Roster, told: str) -> None:
    """A round is ended by a member, or by somebody for whom all members are lost."""
    assert after.phase is Phase.GATHERING, told
    assert (after.round, after.generation, after.members) == (before.round + 1, before.generation, before.members), told
    assert before.seats(after.leader) or set(after.lost) == before.ranks.keys(), told


def _check_gathering(before: Roster, after: Roster, told: str) -> None:
    """A gathering goes on, under the next leader where the last one is lost."""
    assert (after.round, after.members) == (before.round, before.members), told
    assert after.cause >= before.cause, told
    assert set(after.lost) >= set(before.lost), told
    assert after.generation >= before.generation, told
    assert after.leader == before.leader or before.leader in after.lost, told


def _check_formed(before: Roster, after: Roster, bounds: Bounds, told: str) -> None:
    """A round begins, sealed under a generation of its own, led by who has gathered it."""
    assert (after.round, after.generation, after.leader) == (before.round, before.generation, before.leader), told
    assert after.seats(after.leader), told
    assert bounds.least <= len(after.members) <= bounds.most, told
    assert len(after.ranks) == len(after.members), told
    assert not after.lost, told
