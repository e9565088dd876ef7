"""Tell a training to stop at random moments, many times, and see that it saves on one step and ends in time.

    python -m benchmarks.stops --rounds 100 --jobs 4 --results stops.jsonl
    python -m benchmarks.stops --rounds 1 --stock --results stops.jsonl       the same of torchrun + Lightning
    python -m benchmarks.stops --table stops.jsonl

It goes on where the results end, and prints the tables of docs/stopping.md. With --jobs, trainings run side by side
and are slower each, which moves the moments of the stops; what is counted is the same.

A row is who is told ({launcher, all workers, rank 0 only, rank 1 only}), how long a step takes (0 and 20 ms) and the
strategy (DDP, FSDP2 by ModelParallelStrategy). Two ranks train a small model, validate every 10 steps and save every 5,
so that the moments, drawn from the first second of the training, fall into steps, validations and saves. SIGTERM asks.

A round *saved* where the command ends with 75 and the newest valid checkpoint is of the step that was agreed on; it
*hung* where something had to be killed. For stock: saved where it ends by itself and left a checkpoint of the step that
it had reached (Lightning saves nothing at a SIGTERM by itself; ModelCheckpoint(save_on_exception=True) is set);
hung where it had not ended after the grace of 30 s.
"""

from __future__ import annotations

import argparse
import collections
import functools
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor import watch
from elastic_fit.supervisor.ledger import read
from elastic_fit.supervisor.store import latest_valid

TARGETS = ("launcher", "all", "rank 0", "rank 1")
NAMES = {"all": "all workers"}
PAUSES_MS = (0, 20)
STRATEGIES = ("ddp", "fsdp2")
GRACE_S = 30.0
SCRIPT = """
import os, sys, time
import lightning.pytorch as pl, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

strategy, pause_s, folder, stock = sys.argv[1], float(sys.argv[2]) / 1000, sys.argv[3], sys.argv[4] == "stock"

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    def configure_model(self):
        if strategy == "fsdp2":
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
        if strategy == "hsdp":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    def training_step(self, batch, batch_idx):
        time.sleep(pause_s)
        return self.net(batch[0]).square().mean()
    def on_train_batch_end(self, *_):
        if stock and os.environ["RANK"] == "0":
            with open(f"{folder}/step", "w") as file:
                file.write(str(self.global_step))
        if self.global_step == 1:
            open(f"{folder}/began.{os.environ['RANK']}", "w").close()
    def validation_step(self, batch, batch_idx):
        self.log("loss", self.net(batch[0]).square().mean(), sync_dist=True)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

def data(n):
    return DataLoader(TensorDataset(torch.randn(n, 16)), batch_size=2)

world = 4 if strategy == "hsdp" else 2
made = "ddp" if strategy == "ddp" else ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
own = [ModelCheckpoint(f"{folder}/stock", every_n_train_steps=5, save_on_exception=True)] if stock else []
trainer = pl.Trainer(
    accelerator="cpu", devices=world, strategy=made, max_epochs=-1, logger=False, callbacks=own,
    enable_checkpointing=stock, enable_progress_bar=False, enable_model_summary=False, val_check_interval=10,
)
trainer.fit(Model(), data(160000), data(40))
"""


def strike(target: str, pids: dict[str, int], launcher: int) -> None:
    """SIGTERM to whom the row says."""
    chosen = {"launcher": [launcher], "all": list(pids.values())}.get(target) or [pids[target.split()[1]]]
    for pid in chosen:
        os.kill(pid, signal.SIGTERM)


def began(folder: Path) -> bool:
    """Whether both ranks have done a step."""
    return all((folder / f"began.{rank}").exists() for rank in (0, 1))


def ours(nursery: Nursery, target: str, pause_ms: int, strategy: str, folder: Path, draw: random.Random) -> str:
    """One round of ours, in this process, with workers from a warm nursery; returns what came of it."""
    script, run = folder / "train.py", folder / "run"
    script.write_text(SCRIPT)
    after_s, ended = draw.uniform(0.0, 1.0), threading.Event()

    def wait_and_strike() -> None:
        while not began(folder) and not ended.wait(0.01):
            pass
        if not ended.wait(after_s):
            started = [one for one in read(run / "events.jsonl") if one.event == "workers_started"]
            strike(target, started[-1]["pids"], os.getpid())

    thread = threading.Thread(target=wait_and_strike)
    thread.start()
    err = io.StringIO()
    argv = ["--run-dir", str(run), "--nproc-per-node", "2", "--checkpoint-steps", "5", "--grace", f"{GRACE_S}s"]
    try:
        rest = [str(script), strategy, str(pause_ms), str(folder), "ours"]
        code = int(launch(parse([*argv, *rest]), Console(out=io.StringIO(), err=err), nursery))
    finally:
        ended.set()
        thread.join()
    events = read(run / "events.jsonl")
    if any(one.event == "stragglers" for one in events):
        return "hung"
    agreed = [int(one["step"]) for one in events if one.event == "stop_decision"]
    newest = latest_valid(run / "checkpoints" / "fit-1").chosen
    if code == 75 and newest is not None and agreed == [newest.manifest.step]:
        return "saved"
    return f"exit {code}, agreed {agreed}, newest {newest.manifest.step if newest else None}: {err.getvalue()[-300:]}"


def stock(target: str, pause_ms: int, strategy: str, folder: Path, draw: random.Random) -> str:
    """One round of torchrun and Lightning's ModelCheckpoint."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", str(script)]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*command, strategy, str(pause_ms), str(folder), "stock"], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 180
        while not began(folder):
            if process.poll() is not None or time.monotonic() > deadline:
                return "did not start"
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 1.0))
        ranks = {child.environ().get("RANK", ""): child.pid for child in psutil.Process(process.pid).children()}
        strike(target, ranks, process.pid)
        try:
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return "hung"
        saved = [int(path.stem.split("step=")[1].split("-")[0]) for path in folder.glob("stock/*step=*")]
        is_saved = max(saved, default=0) == int((folder / "step").read_text())
        return f"saved, exit {code}" if is_saved else f"not saved, exit {code}"
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in family:
            one.kill()
        if process.poll() is None:
            process.kill()
        process.wait()


def rounds_of(path: Path) -> list[dict[str, Any]]:
    """The rounds that are in a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(path: Path) -> str:
    """The counts, as tables in Markdown: who saved, by row, and what came of the others."""
    rounds = rounds_of(path)
    lines = []
    for by in sorted({one["by"] for one in rounds}):
        lines += ["", *_saved_by_row(by, [one for one in rounds if one["by"] == by])]
    others = collections.Counter(
        (one["by"], one["target"], f"{one['pause_ms']} ms", one["strategy"], one["came"].replace("\n", " "))
        for one in rounds
        if one["came"] != "saved"
    )
    if others:
        lines += ["", "| by | who is told | step | strategy | came to | rounds |", "|---|---|---|---|---|---|"]
        lines += [f"| {' | '.join(key)} | {number} |" for key, number in sorted(others.items())]
    return "\n".join(lines[1:])


def _saved_by_row(by: str, rounds: list[dict[str, Any]]) -> list[str]:
    columns = [(strategy, pause_ms) for pause_ms in PAUSES_MS for strategy in STRATEGIES]
    heads = [f"{strategy.upper()}, {pause_ms} ms" for strategy, pause_ms in columns]
    lines = [
        f"{by}: saved {_count(rounds)}",
        "",
        f"| who is told | {' | '.join(heads)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for target in TARGETS:
        cells = [
            _count([one for one in rounds if (one["target"], one["strategy"], one["pause_ms"]) == (target, *column)])
            for column in columns
        ]
        lines.append(f"| {NAMES.get(target, target)} | {' | '.join(cells)} |")
    return lines


def _count(rounds: list[dict[str, Any]]) -> str:
    if not rounds:
        return "-"
    saved = sum(one["came"].startswith("saved") for one in rounds)
    hung = sum(one["came"] == "hung" for one in rounds)
    return f"{saved} of {len(rounds)}" + (f", {hung} hung" if hung else "")


Case = tuple[int, str, int, str]
"""A round's number, who is told, how long a step takes, the strategy."""


def left(args: argparse.Namespace) -> list[Case]:
    """The rounds of this process's share that are not in the results yet, a round of each row in turn."""
    share, jobs = (int(part) for part in args.share.split("/"))
    by = "stock" if args.stock else "ours"
    played = {
        (one["round"], one["target"], one["pause_ms"], one["strategy"])
        for one in rounds_of(args.results)
        if (one["by"], one["seed"]) == (by, args.seed)
    }
    cases = itertools.product(range(args.rounds), TARGETS, PAUSES_MS, STRATEGIES)
    # Shifted by the round, so that no share has the same rows again and again.
    mine = (case for place, case in enumerate(cases) if (place + case[0]) % jobs == share)
    return [case for case in mine if case not in played]


def play(cases: Sequence[Case], args: argparse.Namespace) -> None:
    """Play rounds one after another, each with draws of its own, and write down what came of each."""
    until = time.monotonic() + args.limit
    nursery = None if args.stock else Nursery(warm=True)
    try:
        for number, target, pause_ms, strategy in cases:
            if time.monotonic() > until:
                break
            draw = random.Random(f"{args.seed} {number} {target} {pause_ms} {strategy}")
            with tempfile.TemporaryDirectory(prefix="stops-") as name:
                case = (target, pause_ms, strategy, Path(name), draw)
                came = stock(*case) if nursery is None else ours(nursery, *case)
            record = {"by": "stock" if args.stock else "ours", "target": target, "pause_ms": pause_ms}
            record |= {"strategy": strategy, "round": number, "seed": args.seed, "came": came}
            with args.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if came != "saved":
                print(json.dumps(record), flush=True)
    finally:
        if nursery is not None:
            nursery.close()


def share_out(jobs: int, argv: Sequence[str]) -> None:
    """Play in several processes: each is a launcher of its own, to which signals can be sent."""
    command = [sys.executable, "-m", "benchmarks.stops", *argv]
    here = functools.partial(watch.die_with_parent, os.getpid())
    players = [
        subprocess.Popen([*command, "--jobs", "1", "--share", f"{share}/{jobs}"], preexec_fn=here)
        for share in range(jobs)
    ]
    for player in players:
        player.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Play the rounds that the results lack, print the table; 1 where one of ours was not saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of each row")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stock", action="store_true", help="torchrun + Lightning instead of ours")
    parser.add_argument(
        "--results", type=Path, default=Path("stops.jsonl"), help="rounds that are there are not played"
    )
    parser.add_argument("--jobs", type=int, default=1, help="so many trainings at a time")
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=1e9, help="end after so many seconds, between two rounds")
    parser.add_argument("--table", type=Path, help="print the table of these results, and leave")
    args = parser.parse_args(argv)
    if args.table:
        print(table(args.table))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if args.jobs > 1:
        share_out(args.jobs, sys.argv[1:] if argv is None else argv)
    else:
        play(left(args), args)
    if args.share == "0/1":
        print(table(args.results))
    return int(any(one["came"] != "saved" for one in rounds_of(args.results) if one["by"] == "ours"))


if __name__ == "__main__":
    sys.exit(main())
