"""Reading command lines: torchrun's unchanged, ours after the script, mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_fit.launch.parser import build_parser, parse, parse_duration
from elastic_fit.supervisor.errors import UsageError


@pytest.fixture(autouse=True)
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("")


TORCHRUN_LINES = [
    "--nnodes 1 --nproc-per-node 2 train.py --lr 0.1",
    "--nnodes=1 --nproc_per_node=2 train.py --lr 0.1",
    "--standalone --nproc-per-node 2 train.py --lr 0.1",
    "--nnodes 1:4 --nproc-per-node 2 --rdzv-id job --rdzv-backend c10d --rdzv-endpoint host:29400 train.py --lr 0.1",
    "--nnodes 2 --nproc-per-node 2 --node-rank 1 --master-addr host --master-port 1234 train.py --lr 0.1",
    "--max-restarts 3 --monitor-interval 1 --log-dir logs -r 3 -t 3 --nproc-per-node 2 train.py --lr 0.1",
    "-t0:1,1:3 --nproc-per-node 2 --local-ranks-filter 0 train.py --lr 0.1",
    "--nproc-per-node 2 --role trainer --rdzv-conf last_call_timeout=5,timeout=9 -- train.py --lr 0.1",
]


@pytest.mark.parametrize("line", TORCHRUN_LINES)
def test_torchruns_lines_mean_what_they_mean_to_torchrun(line: str) -> None:
    from torch.distributed.run import parse_args

    theirs = vars(parse_args(line.replace("-- train", "train").split()))
    ours = vars(parse(line.split()).torchrun)
    same = {name for name in theirs if name not in ("max_restarts", "training_script_args")}
    if "--master-port" not in line:
        theirs["master_port"] = None  # torch 2.11 names one where nobody has
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert parse(line.split()).script_args == ("--lr", "0.1")


def test_pet_variables_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    monkeypatch.setenv("PET_MAX_RESTARTS", "7")
    parsed = parse(["train.py"])
    assert parsed.torchrun.nproc_per_node == "3"
    assert parsed.max_restarts == 7


def test_a_variable_of_torchruns_that_makes_no_sense_is_a_mistake_as_its_flag_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PET_MAX_RESTARTS", "often")
    with pytest.raises(UsageError, match="often"):
        parse(["train.py"])


def test_our_variables_are_honoured_and_flags_outrank_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_FIT_KEEP", "7")
    monkeypatch.setenv("ELASTIC_FIT_CHECKPOINT_INTERVAL", "2m")
    assert parse(["train.py"]).settings.keep == 7
    assert parse(["train.py"]).settings.checkpoint_interval_s == 120
    assert parse(["train.py", "--keep", "2"]).settings.keep == 2


def test_script_first_takes_our_flags_out_of_what_follows() -> None:
    parsed = parse(
        ["train.py", "--nnodes", "1:4", "--lr", "0.1", "--nproc_per_node=2", "--checkpoint-steps", "50", "--flag"]
    )
    assert parsed.script_args == ("--lr", "0.1", "--flag")
    assert parsed.torchrun.nnodes == "1:4"
    assert parsed.torchrun.nproc_per_node == "2"
    assert parsed.settings.checkpoint_steps == 50


def test_script_first_up_to_the_double_dash() -> None:
    parsed = parse(["train.py", "--keep", "5", "--", "--keep", "9", "--help"])
    assert parsed.settings.keep == 5
    assert parsed.script_args == ("--keep", "9", "--help")


def test_flags_first_leaves_everything_after_the_script_to_it() -> None:
    parsed = parse(["--keep", "5", "train.py", "--keep", "9", "--nnodes", "7"])
    assert parsed.settings.keep == 5
    assert parsed.script_args == ("--keep", "9", "--nnodes", "7")


def test_a_module(tmp_path: Path) -> None:
    parsed = parse(["-m", "package.train", "--lr", "1"])
    assert parsed.module
    assert parsed.script == "package.train"
    assert parsed.run_dir == Path("runs/package_train")


MISTAKES = {
    "--nproc 2 train.py": "did you mean --nproc-per-node?",
    "--wrong train.py": "flags of the script go after it",
    "status": "a command is one of run, ls, verify",
    "train.py --nnodes": "--nnodes lacks its value",
    "--nproc-per-node 2 --keep": "--keep lacks its value",
    "--nnodes 1:2 --rdzv-conf silence train.py": "silence is not KEY=VALUE",
    "--nnodes 1:2 --rdzv-conf silence=long train.py": "silence=long is not a number from 2.1",
    "--nnodes 1:2 --rdzv-conf silence=1,port=29500 train.py": "silence=1 is not a number from 2.1",
    "--nnodes 1:2 --rdzv-conf port=http train.py": "port=http is not a number from 0 to 65535",
    "--nnodes 1:2 --rdzv-conf port=70000 train.py": "port=70000 is not a number from 0 to 65535",
    "--master-port 99999 train.py": "--master-port: 99999 is no port",
    "--nnodes 1:2 --rdzv-endpoint h1:99999 train.py": "--rdzv-endpoint: 99999 is no port",
    "--chekpoint-steps 5 train.py": "did you mean --checkpoint-steps",
    "missing.py": "there is no script missing.py",
    "--nnodes 4:1 train.py": "--nnodes 4:1",
    "--nnodes some train.py": "--nnodes some",
    "--max-restarts -1 train.py": "below zero",
    "--checkpoint-interval soon train.py": "not a duration",
    "--keep 0 train.py": "not a whole number above zero",
    "-m --no-python train.py": "exclude each other",
    "--nproc-per-node 2": "no script to run",
    "--nproc-per-node gpu train.py": "Cuda is not available",
    "--nproc-per-node many train.py": "--nproc-per-node many",
    "--nproc-per-node 0 train.py": "not above zero",
    "--tee all train.py": "--tee all names no streams",
    "--redirects 9 train.py": "--redirects 9 names no streams",
    "--local-ranks-filter first train.py": "--local-ranks-filter first",
    "--event-log-handler none train.py": "one of console",
    "--master-port http train.py": "invalid int value",
    "--nnodes 1:4 --rdzv-backend c10 train.py": "there is no rendezvous backend c10",
    "--nnodes 1:4 --rdzv-backend zookeeper train.py": "one of static, c10d, etcd, etcd-v2",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_named_with_a_hint(line: str) -> None:
    with pytest.raises(UsageError) as mistake:
        parse(line.split())
    assert MISTAKES[line] in f"{mistake.value.message} {mistake.value.hint}"
    assert mistake.value.hint
    assert "\n" not in mistake.value.message


def test_help_may_follow_other_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--nnodes", "1", "--help"])
    assert end.value.code == 0
    assert "--checkpoint-steps" in capsys.readouterr().out


def test_help_says_that_c10d_is_the_run_folder_and_what_the_endpoint_is_asked() -> None:
    told = " ".join(build_parser().format_help().split())
    assert "static (the default) and c10d: the run folder" in told
    assert "With static and c10d: the node that is asked whether it sees the same run folder" in told


def test_help_says_what_the_rendezvous_can_be_told() -> None:
    told = " ".join(build_parser().format_help().split())
    for key in ("silence", "port", "last_call_timeout", "join_timeout"):
        assert f"{key}, " in told


def test_what_the_rendezvous_is_told_and_torchruns_other_keys() -> None:
    parsed = parse(["--rdzv-conf", "timeout=9,silence=8, port=29500,is_host=true", "--nnodes", "1:2", "train.py"])
    assert parsed.rendezvous == {"silence": 8.0, "port": 29500.0}


def test_our_flags_that_the_script_gets_because_another_stands_before_it_are_named() -> None:
    assert parse(["--keep", "5", "train.py", "--dry-run", "--nnodes", "2"]).not_ours == ("--dry-run",)
    assert parse(["--keep", "5", "train.py", "--", "--dry-run"]).not_ours == ()
    assert parse(["--nnodes", "1", "train.py", "--lr", "1", "--role", "x"]).not_ours == ()
    assert parse(["train.py", "--dry-run", "--keep", "5"]).not_ours == ()


def test_flags_of_torchruns_that_change_nothing_here_are_named() -> None:
    assert parse(["--numa-binding", "node", "train.py"]).without_effect == ("--numa-binding",)
    assert parse(["--tee", "3", "train.py"]).without_effect == ()
    others = parse(["--start-method", "fork", "--monitor-interval=5", "--signals-to-handle", "SIGUSR1", "train.py"])
    assert others.without_effect == ("--start-method", "--monitor-interval", "--signals-to-handle")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("500ms", 0.5), ("30s", 30), ("5m", 300), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
