"""The demo with several hosts: train on digits, take the first host's power away, let another join, count samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from counted_digits import LAST_EPOCH, NOTES, SAMPLES
from kill_a_worker import WANTED_ACCURACY, accuracy, say

from elastic_fit.supervisor.ledger import Event, read

ROOT = Path(__file__).resolve().parent.parent
HOSTS = str(ROOT / "scripts" / "hosts")
SCRIPT = ROOT / "scripts" / "counted_digits.py"
STRIKE_AT_STEP = 60
EPOCHS_MORE = 5
LONGEST_S = 180.0


class Job:
    """Launchers of one job on hosts of their own."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.notes = run.parent / NOTES
        self.epochs = 0
        self.launchers: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, host: str) -> None:
        """Start the same command on one more host."""
        command = [sys.executable, "-m", "elastic_fit", "--nnodes", "1:4", "--checkpoint-steps", "20"]
        command += ["--run-dir", str(self.run), str(SCRIPT), str(self.run.parent)]
        say(f"{host}$ elastic-fit {' '.join(command[3:])}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # One host's output is enough for one terminal; all of it is in the run's logs.
        quiet = subprocess.DEVNULL if self.launchers else None
        self.launchers[host] = subprocess.Popen(
            [HOSTS, "exec", host, *command], cwd=self.run.parent, stderr=quiet, stdout=quiet, env=environment
        )

    def events(self, name: str) -> list[Event]:
        """The ledger's events of one kind."""
        return [event for event in read(self.run / "events.jsonl") if event.event == name]

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        """Wait until `condition` holds. Raises TimeoutError."""
        deadline = time.monotonic() + LONGEST_S
        while not condition():
            if time.monotonic() > deadline or all(one.poll() is not None for one in self.launchers.values()):
                raise TimeoutError(what)
            time.sleep(0.05)

    def nodes(self) -> list[str]:
        """Who trains, by rank, as the newest round has it."""
        rounds = [event for event in self.events("membership") if event.get("change") == "round"]
        return list(rounds[-1]["nodes"]) if rounds else []

    def end_soon(self) -> None:
        """Have the training end a few epochs from now; all ranks find that out in time."""
        last = json.loads(self.notes.read_text().splitlines()[-1])["epoch"] + EPOCHS_MORE
        temporary = self.notes.with_name("last-epoch.tmp")
        temporary.write_text(str(last))
        temporary.rename(self.notes.with_name(LAST_EPOCH))
        self.epochs = last + 1

    def wrong_samples(self) -> dict[int, int]:
        """By epoch, how many samples were not taken exactly once; of a step done twice, the last time counts."""
        rounds: dict[tuple[int, int], dict[str, list[int]]] = {}
        order: dict[str, int] = {}
        for line in self.notes.read_text().splitlines():
            note = json.loads(line)
            by_round = rounds.setdefault((note["epoch"], note["step"]), {})
            by_round.setdefault(note["round"], []).extend(note["samples"])
            order.setdefault(note["round"], len(order))
        taken: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(self.epochs)}
        for (epoch, _), by_round in rounds.items():
            taken[epoch].update(by_round[max(by_round, key=order.__getitem__)])
        wrong = {epoch: sum(times[sample] != 1 for sample in range(SAMPLES)) for epoch, times in taken.items()}
        return {epoch: samples for epoch, samples in wrong.items() if samples}

    def trains_again_after(self, moment: float) -> float:
        """Seconds from `moment` to the first step of the last node that trains since; 0 where none does yet."""
        since = [event.t for event in self.events("training") if event.t > moment]
        return max(since) - moment if len(since) >= len(self.nodes()) else 0.0


def main(count: int) -> int:
    """Run it; returns 0 where the run went on, took the newcomer in and learned."""
    if os.geteuid() != 0:
        say("hosts on one machine are network namespaces, and those need root")
        return 2
    run = Path(tempfile.mkdtemp(prefix="elastic-fit-demo-")) / "digits"
    os.environ.setdefault("ELASTIC_FIT_HOSTS", f"demo{os.getpid()}")
    try:
        subprocess.run([HOSTS, "up", str(count + 1)], check=True)
        return play(Job(run), [f"h{number}" for number in range(1, count + 1)], f"h{count + 1}")
    except TimeoutError as error:
        say(f"FAILED: {error} did not come about; the run is in {run}")
        return 1
    finally:
        subprocess.run([HOSTS, "down"], check=True)


def play(job: Job, hosts: list[str], newcomer: str) -> int:
    """The story on hosts that are up."""
    # The terminal shows the last host to start, which is not the one that dies.
    for host in reversed(hosts):
        job.start(host)
    job.wait_for("training on all hosts", lambda: len(job.nodes()) == len(hosts))
    job.wait_for("a save", lambda: any(event["step"] >= STRIKE_AT_STEP for event in job.events("save")))
    first = next(host for host in job.nodes() if host != hosts[-1])
    say(f"power off: {first} (rank {job.nodes().index(first)} of {job.nodes()}) and everything on it is killed")
    struck = time.time()
    subprocess.run([HOSTS, "kill", first], check=True)
    job.wait_for("training without it", lambda: len(job.nodes()) < len(hosts) and job.trains_again_after(struck))
    lost_s = job.trains_again_after(struck)
    job.start(newcomer)
    job.wait_for("training with the newcomer", lambda: newcomer in job.nodes())
    asked = next(event.t for event in job.events("membership") if event.get("change") == "join")
    job.wait_for("training with the newcomer", lambda: job.trains_again_after(asked))
    stood_s = job.trains_again_after(asked)
    job.end_soon()
    codes = {host: launcher.wait(LONGEST_S) for host, launcher in job.launchers.items() if host != first}
    return conclude(job, codes, first, newcomer, lost_s, stood_s)


def conclude(job: Job, codes: dict[str, int], first: str, newcomer: str, lost_s: float, stood_s: float) -> int:
    """Say what it cost."""
    found, wrong = accuracy(job.run), job.wrong_samples()
    repeated = sum(event["steps"] for event in job.events("steps_repeated"))
    if any(codes.values()) or found is None or found < WANTED_ACCURACY:
        say(f"FAILED: exit codes {codes}, held-out accuracy {found}, run folder {job.run}")
        return 1
    if wrong:
        say(f"FAILED: samples that were not taken exactly once, by epoch: {wrong}, run folder {job.run}")
        return 1
    say(f"the run is in {job.run}: elastic-fit ls {job.run}")
    say(f"held-out accuracy {found:.1%}; exit 0 on {', '.join(codes)}")
    say(
        f"losing {first} cost {lost_s:.2f} s, taking {newcomer} in held the others up for {stood_s:.2f} s, "
        f"and {repeated} steps were repeated"
    )
    say(f"the run ended exact: each of {SAMPLES} samples was taken once in every one of {job.epochs} epochs")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
