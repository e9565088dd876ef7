"""Kill one rank of a training at random moments; count the optimizer steps that it costs, and compare what comes after.

    python -m benchmarks.rescues --kills 100 --results rescues.jsonl
    python -m benchmarks.rescues --kills 100 --arm torchrun --results rescues.jsonl
    python -m benchmarks.rescues --kills 100 --arm "torchrun, store not shared" --results rescues.jsonl
    python -m benchmarks.rescues --kills 100 --strategy hsdp --results rescues.jsonl
    python -m benchmarks.rescues --kills 100 --strategy hsdp --deaths 2 --results rescues.jsonl
    python -m benchmarks.rescues --table rescues.jsonl

It goes on where the results end. Runs of 20 kills each, with two ranks (DDP) or four (HSDP: two groups of two), which
validate every 25 steps: killed again each time that all have done a step, after a random part of half a second. Under
elastic-fit nothing is saved but what survivors save; torchrun's script has Lightning's ModelCheckpoint save every 10
steps and on exceptions, and goes on from ``ckpt_path="last"``.

Each rank writes down every state that it holds, with a digest (`benchmarks/witness.py`). So what a kill costs is seen
from outside: the highest step that any rank had completed, less the step that the training went on from. And it is *the
same run* if all that any rank holds from there to the next kill is, bit for bit, what it holds at that step of a run
of the same launcher that nobody disturbs. A run that isn't back in a minute is given up; the next kill is of a new one.

With two deaths the other rank of the victim's replica group is killed as well, within 0.3 s: while survivors save.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.arms import Command, elastic, torchrun
from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.ledger import read

SCRIPT = Path(__file__).parent / "witness.py"
KILLS_A_RUN = 20
RANKS = {"ddp": 2, "hsdp": 4}
LIMIT_S = 60.0
"""Within which all ranks have to have done another step."""
WITHIN_S = 0.5
"""A kill comes within so long of that."""
SECOND_S = 0.3
"""Within which a second rank dies."""
BUDGET = ("--max-restarts", "1000")
ARMS = {
    one.name: one
    for one in (
        elastic("elastic-fit"),
        torchrun("torchrun", *BUDGET),
        torchrun("torchrun, store not shared", *BUDGET, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
    )
}


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of kill."""

    arm: str
    strategy: str
    pause_ms: int = 0
    """What a step takes besides its computation."""
    deaths: int = 1
    """How many ranks die at a time."""

    def script(self, folder: Path, steps: int = -1) -> list[str]:
        """What to launch, with its arguments: it writes to that folder."""
        return [str(SCRIPT), str(folder), self.strategy, str(self.pause_ms), str(steps), ARMS[self.arm].kind]


States = list[tuple[int, str]]
"""What a rank has held, one after the other: steps and digests."""


@dataclass(frozen=True, slots=True)
class Witnessed:
    """All that the ranks of one attempt have written down."""

    pids: dict[int, int]
    states: dict[int, States]

    @property
    def began(self) -> int:
        """The step that it began with."""
        return self.states[0][0][0]

    def has_trained(self, ranks: int) -> bool:
        """Whether all ranks have done a step."""
        return len(self.states) == ranks and all(len(states) > 1 for states in self.states.values())

    def is_part_of(self, run: Witnessed) -> bool:
        """Whether no state differs from the one that another run's same rank has held at that step."""
        return all(set(states) <= set(run.states[rank]) for rank, states in self.states.items())


def witnessed(folder: Path, after: int = -1) -> dict[int, Witnessed]:
    """By attempt, of those after that one."""
    attempts: dict[int, Witnessed] = defaultdict(lambda: Witnessed({}, {}))
    for path in folder.iterdir():
        attempt, rank, pid = map(int, path.name.split("-"))
        if attempt <= after:
            continue
        lines = [line.split() for line in path.read_text().split("\n")[:-1]]
        attempts[attempt].pids[rank] = pid
        attempts[attempt].states[rank] = [(int(step), digest) for step, digest in lines]
    return dict(attempts)


def highest(attempts: Mapping[int, Witnessed]) -> int:
    """The highest step that any rank has completed."""
    return max(states[-1][0] for one in attempts.values() for states in one.states.values() if states)


@dataclass(frozen=True, slots=True)
class Cost:
    """What came of one kill."""

    lost: int | None
    """Optimizer steps; None where the training never went on."""
    same: bool
    """Whether what it went on with is the same run."""


def costs(killed: Sequence[int], attempts: Mapping[int, Witnessed], undisturbed: Witnessed, ranks: int) -> list[Cost]:
    """What each kill came to; `killed` are the attempts that were."""
    found = []
    for attempt in killed:
        back = min((n for n, one in attempts.items() if n > attempt and one.has_trained(ranks)), default=None)
        if back is None:
            found.append(Cost(None, same=False))
        else:
            before = {n: one for n, one in attempts.items() if attempt <= n < back}
            lost = highest(before) - attempts[back].began
            found.append(Cost(lost, same=attempts[back].is_part_of(undisturbed)))
    return found


def strike(folder: Path, row: Row, kills: int, draw: random.Random, ended: Callable[[float], bool]) -> list[int]:
    """Kill so many times, each time that training goes on; returns the attempts that were killed.

    Ends early where the training doesn't go on. `ended` waits so many seconds, or until the job has ended, and says so.
    """
    killed: list[int] = []
    for number in range(kills + 1):
        back = wait_for_training(folder, RANKS[row.strategy], killed[-1] if killed else -1, ended)
        if back is None or ended(draw.uniform(0.0, WITHIN_S)):
            break
        if number < kills:
            kill(witnessed(folder)[back].pids, row.deaths, draw)
            killed.append(back)
    return killed


def wait_for_training(folder: Path, ranks: int, after: int, ended: Callable[[float], bool]) -> int | None:
    """The first attempt after that one all of whose ranks have done a step; None where there is none in time."""
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit and not ended(0.02):
        back = [number for number, one in witnessed(folder, after).items() if one.has_trained(ranks)]
        if back:
            return min(back)
    return None


def kill(pids: dict[int, int], deaths: int, draw: random.Random) -> None:
    """Kill one rank, or it and then the other one of its group."""
    victim = draw.randrange(len(pids))
    victims = [os.pidfd_open(pids[rank]) for rank in (victim, victim ^ 1)[:deaths]]
    for number, process in enumerate(victims):
        time.sleep(draw.uniform(0.0, SECOND_S) if number else 0.0)
        gone = (ProcessLookupError,) if number else ()  # the second one may have left by then
        with contextlib.suppress(*gone):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def ours(nursery: Nursery, row: Row, kills: int, folder: Path, draw: random.Random) -> list[Cost]:
    """What kills of a training under elastic-fit cost, in this process, with workers from a warm nursery."""
    killed, ended = list[int](), threading.Event()
    (states := folder / "states").mkdir()

    def run(name: str, script: Sequence[str]) -> int:
        flags = ["--run-dir", str(folder / name), "--nproc-per-node", str(RANKS[row.strategy]), *BUDGET]
        console = Console(out=io.StringIO(), err=io.StringIO())
        return int(launch(parse([*flags, "--checkpoint-interval", "10h", *script]), console, nursery))

    def strike_and_stop() -> None:
        try:
            killed.extend(strike(states, row, kills, draw, ended.wait))
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=strike_and_stop)
    thread.start()
    try:
        run("run", row.script(states))
    finally:
        ended.set()
        thread.join()
    attempts = witnessed(states)
    (alone := folder / "alone").mkdir()
    assert run("undisturbed", row.script(alone, highest(attempts))) == 0
    return costs(killed, attempts, witnessed(alone)[0], RANKS[row.strategy])


def stock(row: Row, kills: int, folder: Path, draw: random.Random) -> list[Cost]:
    """The same of torchrun and Lightning's ModelCheckpoint."""
    arm, flags = ARMS[row.arm], ["--nproc-per-node", str(RANKS[row.strategy])]
    states, alone = folder / "run" / "states", folder / "undisturbed" / "states"
    for one in (states, alone):
        one.mkdir(parents=True)
    with Command(arm, states.parent, [*flags, *row.script(states)]) as command:
        killed = strike(states, row, kills, draw, command.has_ended)
    attempts = witnessed(states)
    with Command(arm, alone.parent, [*flags, *row.script(alone, highest(attempts))]) as command:
        assert command.process.wait() == 0
    return costs(killed, attempts, witnessed(alone)[0], RANKS[row.strategy])


def play(row: Row, kills: int, seed: int) -> tuple[list[Cost], list[str]]:
    """What kills of one run came to, and why shards never came together."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="rescues-") as name:
        folder = Path(name)
        if not ARMS[row.arm].is_ours:
            return stock(row, kills, folder, draw), []
        nursery = Nursery(warm=True)
        try:
            found = ours(nursery, row, kills, folder, draw)
        finally:
            nursery.close()
        events = read(folder / "run" / "events.jsonl")
        return found, [str(one["why"]) for one in events if one.event == "no_rescue" and "rank" not in one.fields]


def counted(path: Path) -> dict[Row, list[Cost]]:
    """What each kill that is in a file of results came to, by row."""
    found: dict[Row, list[Cost]] = defaultdict(list)
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        found[Row(**record["row"])] += [Cost(lost, same=same) for lost, same in record["costs"]]
    return found


def table(path: Path) -> str:
    """The counts, as a table in Markdown."""
    heads = "| | strategy | step | deaths | kills | went on | cost no step | cost one | mean | most | the same run |"
    lines = [heads, "|---" * 11 + "|"]
    for row, found in counted(path).items():
        lost = [one.lost for one in found if one.lost is not None]
        kind = f"{row.arm} | {row.strategy.upper()} | {row.pause_ms} ms | {row.deaths} | {len(found)}"
        counts = f"{len(lost)} | {lost.count(0)} | {lost.count(1)} | {sum(lost) / max(1, len(lost)):.1f}"
        lines.append(f"| {kind} | {counts} | {max(lost, default='-')} | {sum(one.same for one in found)} |")
    return "\n".join(lines)


def is_good(found: Sequence[Cost]) -> bool:
    """Whether no kill costs more than one step, at most one in a hundred does, and all went on as the same run."""
    costly = sum(one.lost != 0 for one in found)
    return all(one.lost in (0, 1) and one.same for one in found) and costly <= max(1, len(found) // 100)


def main(argv: Sequence[str] | None = None) -> int:
    """Play the kills that the results lack; 1 where those of ours cost more than they may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--arm", choices=ARMS, default="elastic-fit")
    parser.add_argument("--strategy", choices=RANKS, default="ddp")
    parser.add_argument("--pause-ms", type=int, default=0, help="how long a step sleeps")
    parser.add_argument("--deaths", type=int, choices=(1, 2), default=1, help="at a time; 2 with hsdp only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("rescues.jsonl"), help="kills that are there count")
    parser.add_argument("--table", type=Path, help="print the table of these results, and leave")
    args = parser.parse_args(argv)
    if args.table:
        print(table(args.table))
        return 0
    if args.deaths > 1 and args.strategy != "hsdp":
        parser.error("of two ranks, nobody is left to rescue what two deaths cost")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    row = Row(args.arm, args.strategy, args.pause_ms, args.deaths)
    while (there := len(counted(args.results)[row])) < args.kills:
        seed = args.seed + there
        found, why = play(row, min(KILLS_A_RUN, args.kills - there), seed)
        if not found:
            print("the run ended before it was killed", file=sys.stderr)
            return 1
        with args.results.open("a") as file:
            kept = {"row": asdict(row), "seed": seed, "costs": [(one.lost, one.same) for one in found], "why": why}
            file.write(json.dumps(kept) + "\n")
    print(table(args.results))
    return int(ARMS[row.arm].is_ours and not is_good(counted(args.results)[row]))


if __name__ == "__main__":
    sys.exit(main())
