"""The demo with several hosts: train examples/digits.py, take the first host's power away, let a new host join."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kill_a_worker import WANTED_ACCURACY, accuracy, say

from elastic_fit.supervisor.ledger import Event, read

ROOT = Path(__file__).resolve().parent.parent
HOSTS = str(ROOT / "scripts" / "hosts")
STRIKE_AT_STEP = 60
EPOCHS = 60
LONGEST_S = 180.0


class Job:
    """Launchers of one job on hosts of their own."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.launchers: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, host: str) -> None:
        """Start the same command on one more host."""
        command = [sys.executable, "-m", "elastic_fit", str(ROOT / "examples" / "digits.py"), "--nnodes", "1:4"]
        command += ["--checkpoint-steps", "20", "--run-dir", str(self.run), "--epochs", str(EPOCHS)]
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
    subprocess.run([HOSTS, "down"], check=True)
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
    codes = {host: launcher.wait(LONGEST_S) for host, launcher in job.launchers.items() if host != first}
    return conclude(job, codes, first, newcomer, lost_s, stood_s)


def conclude(job: Job, codes: dict[str, int], first: str, newcomer: str, lost_s: float, stood_s: float) -> int:
    """Say what it cost."""
    found = accuracy(job.run)
    repeated = sum(event["steps"] for event in job.events("steps_repeated"))
    if any(codes.values()) or found is None or found < WANTED_ACCURACY:
        say(f"FAILED: exit codes {codes}, held-out accuracy {found}, run folder {job.run}")
        return 1
    say(f"the run is in {job.run}: elastic-fit ls {job.run}")
    say(f"held-out accuracy {found:.1%}; exit 0 on {', '.join(codes)}")
    say(
        f"losing {first} cost {lost_s:.2f} s, taking {newcomer} in held the others up for {stood_s:.2f} s, "
        f"and {repeated} steps were repeated"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
