"""Tell a training to stop at random moments, many times, and see that it saves on one step and ends in time.

    python -m benchmarks.stops --rounds 100 --results stops.jsonl
    python -m benchmarks.stops --rounds 10 --stock --results stops.jsonl      the same of torchrun + Lightning
    python -m benchmarks.stops --table stops.jsonl

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

import psutil

from elastic_fit.launch.parser import parse
from elastic_fit.launch.render import Console
from elastic_fit.launch.run import launch
from elastic_fit.launch.workers import Nursery
from elastic_fit.supervisor.ledger import read
from elastic_fit.supervisor.store import latest_valid

TARGETS = ("launcher", "all", "rank 0", "rank 1")
GRACE_S = 30.0
SCRIPT = """
import os, sys, time
import lightning.pytorch as pl, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
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

made = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else "ddp"
own = [ModelCheckpoint(f"{folder}/stock", every_n_train_steps=5, save_on_exception=True)] if stock else []
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy=made, max_epochs=-1, logger=False, callbacks=own,
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


def table(path: Path) -> str:
    """The counts, as a table in Markdown."""
    rounds = [json.loads(line) for line in path.read_text().splitlines()]
    kinds: dict[tuple[str, ...], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in rounds:
        came = one["came"].split(",")[0].split(" ")[0] if one["by"] == "ours" else one["came"]
        kinds[one["by"], one["target"], f"{one['pause_ms']} ms", one["strategy"]][came] += 1
    lines = [
        "| by | who is told | step | strategy | rounds | saved | hung | else |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, counts in sorted(kinds.items()):
        saved = sum(number for came, number in counts.items() if came.startswith("saved"))
        others = "; ".join(f"{number}x {came}" for came, number in counts.items() if not came.startswith("saved"))
        lines.append(f"| {' | '.join(key)} | {counts.total()} | {saved} | {counts['hung']} | {others or '-'} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Play the rounds, a round of each row in turn; 1 where one of ours was not saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stock", action="store_true", help="torchrun + Lightning instead of ours")
    parser.add_argument("--results", type=Path, default=Path("stops.jsonl"))
    parser.add_argument("--limit", type=float, default=1e9, help="end after so many seconds, between two rounds")
    parser.add_argument("--table", type=Path, help="print the table of these results, and leave")
    args = parser.parse_args(argv)
    if args.table:
        print(table(args.table))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    draw, until, bad = random.Random(args.seed), time.monotonic() + args.limit, 0
    nursery = None if args.stock else Nursery(warm=True)
    try:
        rows = itertools.product(range(args.rounds), TARGETS, (0, 20), ("ddp", "fsdp2"))
        for number, target, pause_ms, strategy in rows:
            if time.monotonic() > until:
                break
            with tempfile.TemporaryDirectory(prefix="stops-") as name:
                case = (target, pause_ms, strategy, Path(name), draw)
                came = stock(*case) if nursery is None else ours(nursery, *case)
            bad += came != "saved"
            record = {"by": "stock" if args.stock else "ours", "target": target, "pause_ms": pause_ms}
            record |= {"strategy": strategy, "round": number, "seed": args.seed, "came": came}
            with args.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if came != "saved":
                print(json.dumps(record), flush=True)
    finally:
        if nursery is not None:
            nursery.close()
    return int(bool(bad) and not args.stock)


if __name__ == "__main__":
    sys.exit(main())
