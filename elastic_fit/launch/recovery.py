"""What a recovery took, part by part: from the first worker's death to the step that all workers have done again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic_fit.supervisor.board import Board, Phase, Word


@dataclass(slots=True)
class Recovery:
    """When the parts of a recovery happened, CLOCK_MONOTONIC nanoseconds; 0 where they haven't."""

    failed_ns: int = 0
    noticed_ns: int = 0
    ended_ns: int = 0
    """The last worker of the attempt that failed has ended."""
    met_ns: int = 0
    """The nodes have met for the next attempt."""
    forked_ns: int = 0

    @property
    def is_under_way(self) -> bool:
        """Whether there is a failure that training has not gone on after yet."""
        return bool(self.failed_ns)

    @property
    def teardown_s(self) -> float:
        """How long the workers took to leave, in seconds."""
        return seconds(self.noticed_ns, self.ended_ns)

    def begin(self, failed_ns: int, noticed_ns: int) -> None:
        """A worker or a node was lost."""
        self.failed_ns, self.noticed_ns = failed_ns, noticed_ns

    def finish(self, boards: Sequence[Board]) -> dict[str, float]:
        """All workers have done a step: the parts in seconds, and ``total_s``. The next failure is another recovery."""
        first_step = max(board[Word.FIRST_STEP_NS] for board in boards)
        met, built, loaded = (_last(boards, phase) for phase in (Phase.PROCESS_GROUP, Phase.BUILT, Phase.LOADED))
        phases = {
            "process_group_s": (self.forked_ns, met),
            "build_s": (met, built),
            "load_s": (built, loaded),
            "first_step_s": (loaded or self.forked_ns, first_step),
        }
        took = {
            "detect_s": seconds(self.failed_ns, self.noticed_ns),
            "teardown_s": self.teardown_s,
            "rendezvous_s": seconds(self.ended_ns, self.met_ns),
            "fork_s": seconds(self.met_ns, self.forked_ns),
            **{name: seconds(begin, end) for name, (begin, end) in phases.items() if begin and end},
            "total_s": seconds(self.failed_ns, first_step),
        }
        self.failed_ns = self.noticed_ns = 0
        return took


def seconds(begin_ns: int, end_ns: int) -> float:
    """From `begin_ns` to `end_ns`."""
    return round((end_ns - begin_ns) / 1e9, 6)


def _last(boards: Sequence[Board], phase: Phase) -> int:
    return max(board.entered_ns(phase) for board in boards)
