"""``elastic-fit ls`` and ``verify``: what is there, and what is wrong with it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_fit.launch import cli
from elastic_fit.launch.commands import ls, verify
from elastic_fit.launch.render import Console
from elastic_fit.supervisor.rundir import RunDir
from elastic_fit.supervisor.store import CheckpointStore, Facts

COLUMNS = {"path", "step", "epoch", "kind", "reason", "generation", "branch"}
COLUMNS |= {"finished", "weights_only", "world_size", "valid", "why", "bytes", "created"}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two fits: steps 10 and 20, a torn 30, and a file that was never committed; step 5 of the second."""
    folder = RunDir(tmp_path / "run")
    folder.create(command=["test"])
    first = CheckpointStore(folder.fit(1))
    for step in (10, 20, 30):
        save(first, step)
    (folder.fit(1) / "step=30.ckpt").write_bytes(b"half")
    (folder.fit(1) / "stray.ckpt").write_bytes(b"never committed")
    save(CheckpointStore(folder.fit(2)), 5)
    return folder


def save(store: CheckpointStore, step: int) -> None:
    with store.stage(f"step={step}.ckpt") as staged:
        with staged.open() as file:
            file.write(b"state" * step)
        staged.commit(Facts(step=step, epoch=step // 10, world_size=2, kind="periodic", generation=1))


def call(command, *argv: str) -> tuple[int, str]:
    out = io.StringIO()
    code = command.main(list(argv), Console(out=out, err=io.StringIO()))
    return code, out.getvalue()


def test_json_is_what_the_design_says_newest_first(run: RunDir) -> None:
    code, text = call(ls, str(run.root), "--json")
    document = json.loads(text)
    assert document["schema_version"] == 1
    assert all(set(one) == COLUMNS for one in document["checkpoints"])
    assert [one["step"] for one in document["checkpoints"]] == [30, 20, 10, 5, None]
    assert [one["valid"] for one in document["checkpoints"]] == [False, True, True, True, False]
    assert "4 bytes" in document["checkpoints"][0]["why"]
    assert "no manifest" in document["checkpoints"][-1]["why"]
    assert code == 1


def test_json_tells_all_that_the_order_goes_by_and_what_is_no_start(tmp_path: Path) -> None:
    """Whoever reads it finds by it what a resume would choose."""
    store = CheckpointStore(tmp_path)
    for name, extra in (("end.ckpt", {"finished": True}), ("a.ckpt", {}), ("weights.ckpt", {"weights_only": True})):
        with store.stage(name) as staged:
            with staged.open() as file:
                file.write(b"state")
            staged.commit(Facts(step=30 if name == "weights.ckpt" else 20, extra=extra))
    found = json.loads(call(ls, str(tmp_path), "--json")[1])["checkpoints"]
    assert [Path(one["path"]).name for one in found] == ["weights.ckpt", "end.ckpt", "a.ckpt"]
    chosen = store.latest_valid().chosen
    assert chosen is not None
    assert next(one["path"] for one in found if one["valid"] and not one["weights_only"]) == str(chosen.path)
    assert [one["finished"] for one in found] == [False, True, False]


def test_a_pipe_gets_lines_that_cut_can_take_apart(run: RunDir) -> None:
    _, text = call(ls, str(run.root))
    rows = [line.split("\t") for line in text.splitlines()]
    assert {len(row) for row in rows} == {len(ls.COLUMNS)}
    assert rows[0] == list(ls.COLUMNS)
    assert rows[2][0] == "20"


def test_a_healthy_folder_is_exit_0(run: RunDir) -> None:
    assert call(ls, str(run.fit(2)))[0] == 0
    assert call(verify, str(run.fit(1) / "step=10.ckpt"))[0] == 0


def test_a_flipped_bit_is_found_by_the_deep_look_alone(run: RunDir) -> None:
    path = run.fit(2) / "step=5.ckpt"
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)
    assert call(verify, str(path))[0] == 0
    code, text = call(verify, str(path), "--deep")
    assert code == 1
    assert "digest differs" in text


@pytest.mark.parametrize("name", ["ls", "verify"])
def test_mistakes_are_one_line_and_a_hint(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for argv in ([name], [name, str(tmp_path / "nowhere")], [name, str(tmp_path), "--jsn"]):
        assert cli.main(argv) == 2
        lines = capfd.readouterr().err.splitlines()
        assert [line.split(": ")[1] for line in lines] == ["error", "hint"]


def test_listing_imports_neither_torch_nor_lightning(run: RunDir) -> None:
    for argv in (["ls", str(run.root), "--json"], ["verify", "--deep", str(run.root)]):
        assert modules_behind(*argv).isdisjoint({"torch", "lightning", "rich"})


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "run"])
def test_no_small_command_waits_for_torch_to_say_what_it_does(name: str) -> None:
    assert modules_behind(name, "--help").isdisjoint({"torch", "lightning"})


def modules_behind(*argv: str) -> set[str]:
    """The top-level packages that a command has imported when it ends."""
    code = (
        "import atexit, sys; from elastic_fit.launch import cli; "
        "atexit.register(lambda: print('', *{name.split('.')[0] for name in sys.modules})); cli.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, text=True)
    return set(done.stdout.splitlines()[-1].split())
