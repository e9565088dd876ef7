"""Hosts in network namespaces, each with a launcher, for the tests of jobs over several nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from elastic_fit.supervisor.ledger import Event, read
from elastic_fit.supervisor.roster import Roster

ROOT = Path(__file__).parents[2]
HOSTS = ROOT / "scripts" / "hosts"
TRAIN = Path(__file__).with_name("train.py")
FIT = Path(__file__).with_name("fit.py")
OURS = "eft"
"""What the names of our namespaces begin with; the pid of who made them follows."""
COMMAND = (str(Path(sys.executable).with_name("elastic-fit")),)


@dataclass
class Launched:
    """One launcher on one host."""

    host: str
    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self) -> list[str]:
        """What the launcher itself has said."""
        return [line for line in self.text().splitlines() if line.startswith("elastic-fit:")]

    def told(self, text: str) -> bool:
        """Whether the launcher itself has said this."""
        return any(text in line for line in self.lines())


class Cluster:
    """Use as a context manager: the hosts go away with all that runs on them.

    Args:
        folder: where the run folder, logs and notes are.
        count: of hosts.
        name: letters that tell clusters of one process apart.
    """

    def __init__(self, folder: Path, count: int, *, name: str = "") -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.count = count
        own = {"ELASTIC_FIT_HOSTS": f"{OURS}{os.getpid()}{name}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._environment = {**os.environ, **own}
        self._environment.pop("GLOO_SOCKET_IFNAME", None)
        self._launched = 0
        self._notes: dict[str, list[dict[str, Any]]] = {}
        self._read: dict[str, int] = {}
        """Bytes of each file of notes that have been read."""
        self.launched: list[Launched] = []

    def __enter__(self) -> Cluster:
        remove_orphans()
        self.hosts("down")
        try:
            self.hosts("up", str(self.count))
        except BaseException:
            self.hosts("down")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.hosts("down")
        for launched in self.launched:
            launched.process.wait(10)

    def hosts(self, *args: str) -> str:
        """Run scripts/hosts."""
        done = subprocess.run([str(HOSTS), *args], env=self._environment, capture_output=True, text=True, check=True)
        return done.stdout

    def spawn(self, *args: str) -> subprocess.Popen[bytes]:
        """Run scripts/hosts and leave it running; it ends with the hosts."""
        with (self.folder / f"{args[1]}.spawned.log").open("ab") as file:
            return subprocess.Popen([str(HOSTS), *args], env=self._environment, stdout=file, stderr=subprocess.STDOUT)

    def answers(self, host: str, url: str) -> bool:
        """Whether that address answers when asked from that host."""
        ask = (sys.executable, "-c", "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=2)", url)
        return (
            subprocess.run([str(HOSTS), "exec", host, *ask], env=self._environment, capture_output=True).returncode == 0
        )

    def launch(
        self,
        host: str,
        *,
        flags: tuple[str, ...] = (),
        nodes: str = "1:4",
        steps: int = 100_000,
        step_s: float = 0.05,
        script: Path = FIT,
        **environment: str,
    ) -> Launched:
        """Start a launcher that trains `steps` steps."""
        arguments = (str(script), str(self.folder), str(steps), str(step_s))
        return self.run(host, "--nnodes", nodes, "--run-dir", str(self.run_dir), *flags, *arguments, **environment)

    def run(self, host: str, *args: str, command: tuple[str, ...] = COMMAND, **environment: str) -> Launched:
        """Start a launcher with these arguments, ours or another `command`."""
        self._launched += 1
        log = self.folder / f"{host}.{self._launched}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(HOSTS), "exec", host, *command, *args],
                env={**self._environment, **environment},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        launched = Launched(host, process, log)
        self.launched.append(launched)
        return launched

    # what the script is told, see `fit.py`

    def hold(self, place: str) -> None:
        """From now on, who comes to that place of the script waits there."""
        (self.folder / f"hold-{place}").touch()

    def let_go(self, place: str) -> None:
        """Those who wait there go on."""
        (self.folder / f"hold-{place}").unlink()

    def is_held(self, place: str) -> bool:
        """Whether somebody has come there."""
        return any(note["place"] == place for note in self.notes("held"))

    def end_soon(self) -> int:
        """Have the training end in a second or so; returns the last step."""
        last = max(step["step"] for step in self.steps()) + 25
        temporary = self.folder / "last-step.tmp"
        temporary.write_text(str(last))
        temporary.rename(self.folder / "last-step")
        return last

    def story(self) -> str:
        """What all launchers have said, for a failed assertion."""
        return "\n".join(f"--- {launched.host}\n{launched.text()}" for launched in self.launched)

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 90.0) -> float:
        """See `wait_until` below."""
        return wait_until(condition, timeout_s, self.story)

    def kill_host(self, host: str) -> None:
        """Everything on it dies at once."""
        self.hosts("kill", host)

    def kill_agent(self, launched: Launched) -> None:
        """SIGKILL the launcher alone."""
        launched.process.send_signal(signal.SIGKILL)

    # what is seen

    def notes(self, name: str) -> list[dict[str, Any]]:
        """All that the script has noted under that name, in the order noted."""
        path, notes = self.folder / f"{name}.jsonl", self._notes.setdefault(name, [])
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read.get(name, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[name] = self._read.get(name, 0) + len(whole)
            notes += map(json.loads, whole.splitlines())
        return notes

    def steps(self) -> list[dict[str, Any]]:
        """All steps that any rank has noted, in the order noted."""
        return self.notes("steps")

    def samples(self) -> list[int]:
        """All samples that have gone into the parameters. Of a step that was done twice, the later round counts."""
        rounds: dict[int, dict[str, list[int]]] = {}
        for note in self.notes("samples"):
            rounds.setdefault(note["step"], {}).setdefault(note["port"], []).extend(note["samples"])
        order = list(dict.fromkeys(note["port"] for note in self.notes("samples")))
        return [one for by_port in rounds.values() for one in by_port[max(by_port, key=order.index)]]

    def trains_with(self, world: int, *, after: float = 0.0) -> bool:
        """Whether all ranks of a world of that size have done a step after that time."""
        return len({s["rank"] for s in self.steps() if s["world"] == world and s["t"] > after}) == world

    def repeated(self) -> list[tuple[int, int]]:
        """Steps that rank 0 has done more than once, with how often."""
        done = Counter(step["step"] for step in self.steps() if step["rank"] == 0)
        return [(step, times) for step, times in sorted(done.items()) if times > 1]

    def worlds(self) -> list[int]:
        """The sizes of the worlds that have trained, in order."""
        rounds = dict.fromkeys((step["port"], step["world"]) for step in self.steps())
        return [world for _, world in rounds]

    def events(self, name: str) -> list[Event]:
        return [event for event in read(self.run_dir / "events.jsonl") if event.event == name]

    def roster(self) -> Roster:
        rosters = self.run_dir / "membership" / "rosters"
        newest = max(int(path.stem) for path in rosters.glob("*.json"))
        return Roster.parse((rosters / f"{newest}.json").read_bytes())

    def processes(self, host: str) -> list[str]:
        return self.hosts("pids", host).split()


def remove_orphans() -> None:
    """Take down the hosts of test runs that were killed."""
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for pid, name in set(re.findall(rf"^{OURS}(\d+)([a-z]*)-", found, re.MULTILINE)):
        if not psutil.pid_exists(int(pid)):
            gone = {**os.environ, "ELASTIC_FIT_HOSTS": f"{OURS}{pid}{name}"}
            subprocess.run([str(HOSTS), "down"], env=gone, check=True)


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0, tell: Callable[[], str] = str) -> float:
    """Poll until `condition` holds; returns the seconds that took. AssertionError after `timeout_s`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"it did not come about within {timeout_s} s\n{tell()}"
        time.sleep(0.05)
    return time.monotonic() - began
