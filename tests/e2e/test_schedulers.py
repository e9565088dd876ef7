"""The examples for schedulers are what those schedulers accept, and say of each exit code what it means."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from elastic_fit.launch.parser import Invocation, parse, parse_duration
from elastic_fit.supervisor.exits import Exit

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GOES_ON = {Exit.SAVED, Exit.INTERRUPTED, Exit.TERMINATED}
BatchScript = Callable[[str], "subprocess.Popen[bytes]"]
DOCUMENTS = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))


@pytest.fixture
def job() -> dict[str, Any]:
    return next(document for document in DOCUMENTS if document["kind"] == "Job")["spec"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_kubernetes_accepts_the_manifest(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_kubernetes_is_told_what_each_exit_code_means(job: dict[str, Any]) -> None:
    rules = [rule for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    codes = {rule["action"]: set(rule["onExitCodes"]["values"]) for rule in rules}
    assert codes == {"Ignore": GOES_ON, "FailJob": set(Exit) - GOES_ON - {Exit.FINISHED}}
    names = {container["name"] for container in job["template"]["spec"]["containers"]}
    assert {rule["onExitCodes"]["containerName"] for rule in rules} == names


def test_the_page_says_of_each_exit_code_whether_to_try_again_and_says_it_once() -> None:
    page = " ".join((ROOT / "docs" / "exit-codes.md").read_text().split())
    table, rule = page.split("One rule is enough", 1)
    rows = re.findall(r"\| ([\d, ]+) \| [^|]+ \| ([^|]+) \|", table)
    again = {Exit(int(code)): said.strip("*").startswith("yes") for codes, said in rows for code in codes.split(",")}
    assert again == {code: code in GOES_ON for code in Exit}
    (persons,) = re.findall(r"\. ([\d, and]+) need a person", rule)
    assert {int(code) for code in re.findall(r"\d+", persons)} == set(Exit) - GOES_ON - {Exit.FINISHED}
    assert "verything else" not in rule


def test_the_pods_command_is_one_that_the_launcher_takes_and_ends_within_its_grace(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["elastic-fit"], "no shell that would keep SIGTERM to itself"
    invocation: Invocation = parse(container["args"])
    assert invocation.settings.grace_s < pod["terminationGracePeriodSeconds"]
    assert int(invocation.torchrun.nnodes.split(":")[1]) == job["completions"] == job["parallelism"]
    assert any(str(invocation.run_dir).startswith(mount["mountPath"]) for mount in container["volumeMounts"])


def test_systemd_starts_the_service_again_after_75_only() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(EXAMPLES / "elastic-fit.service")
    service = unit["Service"]
    assert service["Restart"] == "no"
    assert int(service["RestartForceExitStatus"]) == Exit.SAVED
    words = service["ExecStart"].split()
    assert parse_duration(words[words.index("--grace") + 1]) < float(service["TimeoutStopSec"])


def test_the_page_on_exit_codes_names_them_all() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert {int(code) for row in rows for code in row.split(",")} == set(Exit)


@pytest.fixture
def batch_script(tmp_path: Path) -> BatchScript:
    """Start the batch script of the page on exit codes; `srun` is what its `srun` does."""

    def start(srun: str) -> subprocess.Popen[bytes]:
        page = (ROOT / "docs" / "exit-codes.md").read_text()
        (tmp_path / "job.sh").write_text(page.split("```bash\n")[1].split("```")[0])
        bin_ = tmp_path / "bin"
        bin_.mkdir()
        (bin_ / "srun").write_text(f"#!/bin/bash\n{srun}\n")
        (bin_ / "scontrol").write_text('#!/bin/bash\n[ -e saved ] && echo "$@" >> asked\n')
        for command in bin_.iterdir():
            command.chmod(0o755)
        environment = {"PATH": f"{bin_}:/usr/bin:/bin", "SLURM_JOB_ID": "123"}
        bash = shutil.which("bash")
        assert bash
        return subprocess.Popen([bash, "job.sh"], cwd=tmp_path, env=environment)

    return start


def test_the_batch_script_on_that_page_puts_the_job_back_on_75_and_waits_for_the_save(
    tmp_path: Path, batch_script: BatchScript
) -> None:
    # A launcher that is warned, takes a second to save, and exits with 75.
    batch = batch_script("trap 'sleep 1; touch saved; exit 75' USR1; touch up; for i in {1..200}; do sleep 0.05; done")
    try:
        while not (tmp_path / "up").exists():
            assert batch.poll() is None
        batch.send_signal(10)
        assert batch.wait(20) == 75
    finally:
        batch.kill()
    assert (tmp_path / "asked").read_text() == "requeue 123\n"


@pytest.mark.parametrize("code", [Exit.FINISHED, Exit.FAILED, Exit.INTERRUPTED, Exit.TERMINATED, 137])
def test_the_batch_script_on_that_page_ends_with_whatever_code_the_launcher_ends_with(
    tmp_path: Path, batch_script: BatchScript, code: int
) -> None:
    batch = batch_script(f"exit {int(code)}")
    try:
        assert batch.wait(20) == code
    finally:
        batch.kill()
    assert not (tmp_path / "asked").exists()
