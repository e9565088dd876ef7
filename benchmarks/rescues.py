"""Kill one rank of a training at random moments, and count the optimizer steps that it costs.

    python -m benchmarks.rescues --kills 100 --results rescues.jsonl
    python -m benchmarks.rescues --kills 100 --strategy hsdp --results rescues.jsonl
    python -m benchmarks.rescues --kills 100 --strategy hsdp --deaths 2 --results rescues.jsonl
    python -m benchmarks.rescues --table rescues.jsonl

It goes on where the results end. Runs of 20 kills each, under the launcher, with two ranks (DDP) or four (HSDP: two
groups of two), a validation every 10 steps, no checkpoint by time or steps: killed again each time that training is
back, after a random part of half a second. What a kill costs is what the ledger says of it: the highest step that any
rank had completed, less the step that the run went on from. The results also say why shards never came together.

With two deaths the other rank of the victim's replica group is killed as well, within 0.3 s: while survivors save.
"""

from __future__ import annotations

import argparse
import collections
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
from collections.abc import Sequence
from pathlib import Path

from benchmarks.stops import SCRIPT
from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.ledger import read

KILLS_A_RUN = 20
RANKS = {"ddp": "2", "hsdp": "4"}
SECOND_S = 0.3
"""Within which a second rank dies."""
Row = tuple[str, int, int]
"""A strategy, how long a step takes in milliseconds, and how many ranks die at a time."""


def strike(run: Path, kills: int, deaths: int, draw: random.Random, ended: threading.Event) -> None:
    """Kill so many times, each time that training goes on, then ask the run to stop."""
    for number in range(kills + 1):
        events = []
        while sum(one.event == "training" for one in events) <= number:
            if ended.wait(0.02):
                return
            events = read(run / "events.jsonl")
        if ended.wait(draw.uniform(0.0, 0.5)):
            return
        pids = [one for one in events if one.event == "workers_started"][-1]["pids"]
        if number < kills:
            kill(list(pids.values()), deaths, draw)
    os.kill(os.getpid(), signal.SIGTERM)


def kill(pids: list[int], deaths: int, draw: random.Random) -> None:
    """Kill one rank, or it and then the other one of its group; `pids` are those of ranks 0, 1, ..."""
    victim = draw.randrange(len(pids))
    victims = [os.pidfd_open(pids[rank]) for rank in (victim, victim ^ 1)[:deaths]]
    for number, process in enumerate(victims):
        time.sleep(draw.uniform(0.0, SECOND_S) if number else 0.0)
        with contextlib.suppress(ProcessLookupError):  # the second one may have left by then
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def play(kills: int, strategy: str, pause_ms: int, deaths: int, seed: int) -> tuple[list[int], list[str]]:
    """Steps lost by each of the kills, and why shards never came together."""
    ended = threading.Event()
    with tempfile.TemporaryDirectory(prefix="rescues-") as name:
        run, script = Path(name) / "run", Path(name) / "train.py"
        script.write_text(SCRIPT)
        nursery = Nursery(warm=True)
        thread = threading.Thread(target=strike, args=(run, kills, deaths, random.Random(seed), ended))
        thread.start()
        try:
            flags = ["--run-dir", str(run), "--nproc-per-node", RANKS[strategy], "--max-restarts", "1000"]
            argv = [*flags, "--checkpoint-interval", "10h", str(script), strategy, str(pause_ms), name, "ours"]
            launch(parse(argv), Console(out=io.StringIO(), err=io.StringIO()), nursery)
        finally:
            ended.set()
            thread.join()
            nursery.close()
        events = read(run / "events.jsonl")
        why = [str(one["why"]) for one in events if one.event == "no_rescue" and "rank" not in one.fields]
        return [int(one["steps"]) for one in events if one.event == "steps_repeated"], why


def counted(path: Path) -> dict[Row, list[int]]:
    """Steps lost by each kill that is in a file of results, by row."""
    lost: dict[Row, list[int]] = collections.defaultdict(list)
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        lost[record["strategy"], record["pause_ms"], record.get("deaths", 1)] += record["lost"]
    return lost


def table(path: Path) -> str:
    """The counts, as a table in Markdown."""
    lines = ["| strategy | step | deaths | kills | cost no step | cost one | most |", "|---|---|---|---|---|---|---|"]
    for (strategy, pause_ms, deaths), steps in sorted(counted(path).items()):
        counts = f"{len(steps)} | {steps.count(0)} | {steps.count(1)} | {max(steps)}"
        lines.append(f"| {strategy} | {pause_ms} ms | {deaths} | {counts} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Play the kills that the results lack; 1 where one cost more than one step, or more than one in a hundred did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
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
    row = (args.strategy, args.pause_ms, args.deaths)
    while (there := len(counted(args.results)[row])) < args.kills:
        seed = args.seed + there
        lost, why = play(min(KILLS_A_RUN, args.kills - there), *row, seed)
        if not lost:
            print("the run ended before it was killed", file=sys.stderr)
            return 1
        with args.results.open("a") as file:
            about = {"strategy": args.strategy, "pause_ms": args.pause_ms, "deaths": args.deaths, "seed": seed}
            file.write(json.dumps({**about, "lost": lost, "why": why}) + "\n")
    print(table(args.results))
    steps = counted(args.results)[row]
    return int(max(steps, default=0) > 1 or sum(one > 0 for one in steps) > max(1, len(steps) // 100))


if __name__ == "__main__":
    sys.exit(main())
