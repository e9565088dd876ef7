"""ElasticCheckpoint alone, under any launcher: it stops on one agreed step as well, and the process ends with 75."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from elastic_fit.supervisor.store import latest_valid
from tests.agent.harness import free_port, is_gone, wait_until
from tests.checkpoint.test_failing_disks import on_two_ranks
from tests.launching import PRELUDE

SCRIPT = """
from elastic_fit import ElasticCheckpoint

class Long(Model):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(20000, 4)), batch_size=2)
    def validation_step(self, batch, batch_idx):
        self.layer(batch[0])
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(400, 4)), batch_size=2)

class Tell(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step >= 5:
            (HERE / f"there.{RANK}").touch()

def fit(**options):
    saves = ElasticCheckpoint(dirpath=HERE / "checkpoints", keep=2, resume="auto", every_n_train_steps=1000)
    strategy = "ddp" if os.environ["WORLD_SIZE"] != "1" else "auto"
    options = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": strategy, "max_epochs": 1, **options}
    trainer(saves, Tell(), **{"enable_checkpointing": True, **options}).fit(Long())
"""


def run_rank(script: str, environment: dict[str, str], output: str) -> None:
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


class Ranks:
    """The processes of a job that nobody supervises."""

    def __init__(self, context: ForkServerContext, folder: Path, body: str, world: int) -> None:
        self.folder = folder
        script = folder / "train.py"
        script.write_text(PRELUDE + SCRIPT + body)
        ranks = range(world)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        shared |= {"LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
        shared |= {"TORCHELASTIC_RESTART_COUNT": "0", "GLOO_SOCKET_IFNAME": "lo"}
        self.processes: list[ForkServerProcess] = []
        for rank in ranks:
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=run_rank, args=(str(script), own, str(folder / f"out.{rank}")))
            process.start()
            self.processes.append(process)

    def wait_for_training(self) -> None:
        there = [self.folder / f"there.{rank}" for rank in range(len(self.processes))]
        wait_until(lambda: all(path.exists() for path in there), timeout_s=60)

    def send(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def codes(self) -> list[int | None]:
        for process in self.processes:
            process.join(60)
        return [process.exitcode for process in self.processes]

    def step(self) -> int:
        chosen = latest_valid(self.folder / "checkpoints").chosen
        return chosen.manifest.step if chosen else 0

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("out.*")))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "elastic_fit.callbacks.checkpoint"])
    return context


@pytest.fixture
def started(context: ForkServerContext, tmp_path: Path) -> Iterator[object]:
    all_ranks: list[Ranks] = []

    def start(body: str, world: int = 2) -> Ranks:
        for old in tmp_path.glob("there.*"):
            old.unlink()
        all_ranks.append(Ranks(context, tmp_path, body, world))
        return all_ranks[-1]

    yield start
    for ranks in all_ranks:
        ranks.end()


@pytest.mark.parametrize(("told", "number"), [((0,), "SIGTERM"), ((1,), "SIGUSR1"), ((0, 1), "SIGTERM")])
def test_a_signal_to_any_rank_saves_on_one_step_and_all_end_with_75(
    started, told: tuple[int, ...], number: str
) -> None:
    ranks = started("fit()\n")
    ranks.wait_for_training()
    for rank in told:
        ranks.send(rank, getattr(signal, number))
    assert ranks.codes() == [75, 75], ranks.said()
    step = ranks.step()
    assert step >= 5
    second = started(f"fit(max_steps={step + 3})\n")
    assert second.codes() == [0, 0], second.said()
    trained = (second.folder / "trained.notes").read_text().split()
    assert trained == [str(number) for number in range(1, step + 4)]


def test_a_stop_saves_the_whole_state_also_where_a_script_saves_weights_only(started) -> None:
    body = """
def fit(**options):
    folder = HERE / "checkpoints"
    saves = ElasticCheckpoint(dirpath=folder, save_weights_only=True, every_n_train_steps=1, resume="auto")
    trainer(saves, Tell(), **{"enable_checkpointing": True, "max_epochs": 1, **options}).fit(Long())
"""
    ranks = started(body + "fit()\n", 1)
    ranks.wait_for_training()
    ranks.send(0, signal.SIGTERM)
    assert ranks.codes() == [75], ranks.said()
    step = ranks.step()
    assert step >= 5
    second = started(body + f"fit(max_steps={step + 3})\n", 1)
    assert second.codes() == [0], second.said()
    trained = (second.folder / "trained.notes").read_text().split()
    assert trained == [str(number) for number in range(1, step + 4)]


@pytest.mark.parametrize("parts", [6, 16], ids=["within an epoch", "at an epoch's start"])
def test_a_stop_in_a_validation_within_an_accumulation_goes_back_to_the_streams_it_began_with(
    started, parts: int
) -> None:
    body = f"""
pl.seed_everything(7)
class Drops(Model):
    def training_step(self, batch, batch_idx):
        return super().training_step([torch.nn.functional.dropout(batch[0], 0.3)], batch_idx)
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(128.0).reshape(32, 4) / 100), batch_size=2, shuffle=True)
    def validation_step(self, batch, batch_idx):
        if self.trainer.current_epoch == 1 and STOPS:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)  # it is heard long before the last batch
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(400, 4)), batch_size=2)
    def on_fit_end(self):
        note("parameters", str([p.tolist() for p in self.parameters()]).replace(" ", ""))
def fit(folder):
    saves = ElasticCheckpoint(dirpath=HERE / folder, resume="auto", every_n_train_steps=1000)
    options = {{"accumulate_grad_batches": {parts}, "val_check_interval": 0.5, "enable_checkpointing": True}}
    trainer(saves, max_epochs=3, **options).fit(Drops())
"""
    stopped = started(body + "STOPS = True\nfit('checkpoints')\n", 1)
    assert stopped.codes() == [75], stopped.said()
    assert stopped.step() == -(-16 // parts) + 8 // parts
    for folder in ("checkpoints", "undisturbed"):
        assert started(body + f"STOPS = False\nfit('{folder}')\n", 1).codes() == [0]
    gone_on, undisturbed = (stopped.folder / "parameters.notes").read_text().split()
    assert gone_on == undisturbed


def test_a_signal_to_all_processes_also_to_those_that_read_the_data_saves_and_all_end_with_75(started) -> None:
    readers = """
class Read(Long):
    def train_dataloader(self):
        data = TensorDataset(torch.randn(20000, 4))
        return DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
Long = Read
fit()
"""
    ranks = started(readers)
    ranks.wait_for_training()
    for process in ranks.processes:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGTERM)
    assert ranks.codes() == [75, 75], ranks.said()
    assert ranks.step() >= 5


def test_a_notice_that_blocks_keeps_nobody_from_being_told_nor_the_processes_from_ending(started) -> None:
    ranks = started("import elastic_fit\nelastic_fit.on_stop_notice(lambda: time.sleep(600))\nfit()\n")
    ranks.wait_for_training()
    ranks.send(1, signal.SIGTERM)
    assert ranks.codes() == [75, 75], ranks.said()


def test_one_process_alone_does_so_too_and_a_second_interrupt_ends_it_at_once(started) -> None:
    ranks = started("fit()\n", 1)
    ranks.wait_for_training()
    ranks.send(0, signal.SIGINT)
    assert ranks.codes() == [75], ranks.said()
    assert ranks.step() >= 5
    stuck = """
import time
class Stuck(Long):
    def training_step(self, batch, batch_idx):
        if (HERE / 'there.0').exists():
            (HERE / "stuck").touch()
            while not (HERE / "never").exists():
                time.sleep(0.01)
        return super().training_step(batch, batch_idx)
Long = Stuck
fit()
"""
    second = started(stuck, 1)
    wait_until((second.folder / "stuck").exists, timeout_s=60)
    second.send(0, signal.SIGINT)
    wait_until(lambda: "stopping (SIGINT)" in second.said())
    second.send(0, signal.SIGINT)
    assert second.codes() == [130], second.said()
    assert second.step() == ranks.step(), "and nothing is saved on the way out"


def test_a_process_under_nohup_and_in_the_background_outlives_its_terminal_and_hears_a_scheduler(started) -> None:
    ignored = "for number in (signal.SIGHUP, signal.SIGINT):\n    signal.signal(number, signal.SIG_IGN)\n"
    ranks = started(ignored + "fit()\n", 1)
    ranks.wait_for_training()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        ranks.send(0, number)
    assert ranks.codes() == [75], ranks.said()
    assert "stopping (SIGTERM)" in ranks.said()


STARTED_BY_LIGHTNING = """
import os, signal, sys, time
from pathlib import Path
from elastic_fit import ElasticCheckpoint
from tests.checkpoint.models import Line, trainer

HERE = Path(sys.argv[1])

class Stuck(Line):
    def training_step(self, batch, batch_idx):
        (HERE / f"pid.{self.global_rank}.new").write_text(str(os.getpid()))
        (HERE / f"pid.{self.global_rank}.new").rename(HERE / f"pid.{self.global_rank}")
        while True:
            time.sleep(0.01)

trainer(HERE, ElasticCheckpoint(dirpath=HERE), max_epochs=1, devices=2, strategy="ddp").fit(Stuck())
"""


def test_a_second_interrupt_of_the_rank_that_started_the_others_ends_them_as_well(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(STARTED_BY_LIGHTNING)
    paths = [tmp_path / f"pid.{rank}" for rank in (0, 1)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "output").open("wb") as output:
        first = subprocess.Popen(
            [sys.executable, script, tmp_path], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        wait_until(lambda: all(path.exists() for path in paths), timeout_s=120)
        first.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping (SIGINT)" in (tmp_path / "output").read_text())
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 130, (tmp_path / "output").read_text()
        wait_until(lambda: is_gone(int(paths[1].read_text())))
    finally:
        first.kill()
        first.wait()
        for path in paths:
            if path.exists() and not is_gone(pid := int(path.read_text())):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_before_the_first_step_has_nothing_to_save_and_its_exit_code_names_the_signal(
    started, number: str, code: int
) -> None:
    ranks = started(
        f"""
from elastic_fit.callbacks import desk
class Told(Long):
    def on_fit_start(self):
        os.kill(os.getpid(), signal.{number})
        while not desk.current().request:
            time.sleep(0.001)
Long = Told
fit()
""",
        1,
    )
    assert ranks.codes() == [code], ranks.said()
    assert ranks.step() == 0


def test_a_dead_peer_costs_no_step_because_the_survivor_saves(started) -> None:
    ranks = started(
        """
class Dies(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        if RANK == 1 and trainer.global_step == 7:
            die()
make = trainer
def trainer(*callbacks, **options):
    return make(*callbacks, Dies(), **options)
fit()
"""
    )
    codes = ranks.codes()
    assert codes[1] == -9
    assert codes[0] not in (0, 75)
    assert ranks.step() == 7


def test_survivors_of_hsdp_save_their_shards_without_anybody_who_tells_them_to(started) -> None:
    ranks = started(
        """
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

class Dies(Long):
    def configure_model(self):
        fully_shard(self.layer, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    def on_train_batch_start(self, batch, batch_idx):
        if RANK == 3 and self.global_step == 7:
            die()
Long = Dies
fit(strategy=ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1))
""",
        world=4,
    )
    codes = ranks.codes()
    assert codes[3] == -9
    assert not {0, 75} & {*codes[:3]}
    assert ranks.step() == 7


def test_what_a_dead_process_has_left_is_swept_on_the_node_that_it_was_on(started) -> None:
    body = """
import socket, zlib
def left_by(host, pid=2**22 + 1):
    return HERE / "checkpoints" / f".step=5.ckpt.tmp-0-{zlib.crc32(host.encode()):08x}-{pid}-0123abcd"
left_by(f"host-{RANK}").mkdir(parents=True)
left_by(f"another-{RANK}").mkdir()
socket.gethostname = lambda: f"host-{RANK}"
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=str(RANK))
fit(devices=1, num_nodes=2, max_steps=2)
(HERE / "left").write_text(" ".join(str(number) for number in (0, 1) if left_by(f"host-{number}").exists()))
"""
    ranks = started(body)
    assert ranks.codes() == [0, 0], ranks.said()
    assert (ranks.folder / "left").read_text() == ""
    assert len([path for path in (ranks.folder / "checkpoints").iterdir() if path.name.startswith(".")]) == 2


def test_lightnings_handlers_and_broadcast_are_back_after_the_fit(started) -> None:
    ranks = started(
        """
def mine(*_): pass
signal.signal(signal.SIGUSR2, mine)
seen = []
class Look(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2)))
        assert "_broadcast_sigterm_tensor" in vars(trainer.fit_loop.epoch_loop)
made = []
make = trainer
def trainer(*callbacks, **options):
    made.append(make(*callbacks, Look(), **options))
    return made[-1]
fit(max_steps=3)
assert seen[0][0] is not signal.SIG_DFL, "ours while it trains"
assert seen[0][1] is mine, "a script's own handler of another signal is left alone"
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "and the one that was there before is back"
assert "_broadcast_sigterm_tensor" not in vars(made[0].fit_loop.epoch_loop)
""",
        1,
    )
    assert ranks.codes() == [0], ranks.said()


def test_lightnings_handlers_are_back_after_a_fit_that_the_script_saw_fail(started) -> None:
    ranks = started(
        """
made = []
make = trainer
def trainer(*callbacks, **options):
    made.append(make(*callbacks, At(3, fall_over), **options))
    return made[-1]
before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
try:
    fit()
except RuntimeError:
    pass
assert made[0].global_step == 3
assert {number: signal.getsignal(number) for number in before} == before
assert signal.set_wakeup_fd(-1) == -1
assert "_broadcast_sigterm_tensor" not in vars(made[0].fit_loop.epoch_loop)
assert "register_signal_handlers" not in vars(made[0]._signal_connector)
os.kill(os.getpid(), signal.SIGTERM)
""",
        1,
    )
    assert ranks.codes() == [-signal.SIGTERM], ranks.said()


def test_a_signal_to_a_rank_that_waits_in_a_collective_is_heard_at_once(started) -> None:
    ranks = started(
        """
import sys, threading
from elastic_fit.callbacks import desk

def strike_in_the_collective():
    main = threading.main_thread().ident
    while sys._current_frames()[main].f_code.co_name != "_engine_run_backward":
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)

class Apart(Long):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5 and RANK == 1:
            threading.Thread(target=strike_in_the_collective).start()
        if self.global_step == 5 and RANK == 0:
            limit = time.monotonic() + 20
            while not desk.current().request and time.monotonic() < limit:
                time.sleep(0.001)
            note("heard", desk.current().request)
        return super().training_step(batch, batch_idx)
Long = Apart
fit()
"""
    )
    assert ranks.codes() == [75, 75], ranks.said()
    assert (ranks.folder / "heard.notes").read_text().split() == ["1"]


def test_a_tensor_parallel_model_with_buffers_trains_as_it_does_without_us(started) -> None:
    body = """
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    class Scaled(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("scale", torch.ones(3))

    class Parallel(Long):
        def __init__(self):
            super().__init__()
            self.scaled, self.norm = torch.nn.Sequential(Scaled()), torch.nn.BatchNorm1d(4)
        def configure_model(self):
            parallelize_module(self.scaled, self.device_mesh["tensor_parallel"], {"0": ColwiseParallel()})
        def training_step(self, batch, batch_idx):
            return self.layer(self.norm(batch[0])).square().mean() + self.scaled(batch[0]).square().mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, foreach=False)
    Long = Parallel
    fit(strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1), max_steps=8)
    """
    ranks = started(textwrap.dedent(body), 1)
    assert ranks.codes() == [0], ranks.said()
    assert (ranks.folder / "trained.notes").read_text().split() == [str(number) for number in range(1, 9)]


def test_the_thread_that_asks_for_requests_doesnt_abort_a_process_that_has_finished(tmp_path: Path) -> None:
    """It hardly ever is anywhere else than in the store's native code."""
    script = """
import sys
from elastic_fit import ElasticCheckpoint
from elastic_fit.callbacks import alone
from tests.checkpoint.models import Line, trainer
alone.LOOK_S = 0.0
trainer(sys.argv[1], ElasticCheckpoint(dirpath=sys.argv[1]), max_epochs=1, devices=2, strategy="ddp").fit(Line())
"""
    ranks = on_two_ranks(script, tmp_path)
    assert [one.returncode for one in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
