"""The check of a new cluster, where there is no GPU: what it finds, and that it finds what is wrong."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from a2tgpo.config.load import load_config
from a2tgpo.data.question_set import load_questions
from tools import gpu_checks_run
from tools.gpu_checks_engine import write_run
from tools.gpu_checks_launch import launched_environment, rank_environments
from tools.gpu_checks_run import Bench, run_check

ROOT = Path(__file__).resolve().parents[3]
TOOL = [str(ROOT / "tools" / "gpu_check.py")]
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """As from a terminal: a process group that another test formed in this process may have left its variables."""
    mine = {key: value for key, value in os.environ.items() if key not in LAUNCHER_NAMES}
    return subprocess.run(
        command, env=mine | environment, capture_output=True, text=True, timeout=600, check=False
    )


def checks_in(file: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(file.read_text())["checks"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.distributed
def test_on_a_cpu_what_has_a_meaning_passes_and_the_rest_says_why_not(tmp_path):
    done = run([sys.executable, *TOOL, "--json", str(tmp_path / "found.json")])
    assert done.returncode == 0, done.stdout + done.stderr
    found = checks_in(tmp_path / "found.json")
    assert {name: row["status"] for name, row in found.items()} == {
        "all-reduce 1 MiB": "PASS",
        "all-reduce 16 MiB": "PASS",
        "packed attention, log-probs": "PASS",
        "packed attention, gradients": "PASS",
        "branches of one sequence, log-probs": "PASS",
        "context parallel, log-probs": "PASS",
        "context parallel, gradients": "PASS",
        "fp8": "SKIP",
        "engine memory": "SKIP",
        "refit, probe of first weights": "PASS",
        "training step, metrics that are not finite": "PASS",
        "weights moved, log-probs of the probe": "PASS",
        "refit, probe of moved weights": "PASS",
    }
    assert all("no GPU is seen" in found[name]["note"] for name in ("fp8", "engine memory"))
    # Two ways of computing: equal to the bit would mean that one was compared with itself.
    assert 0 < found["packed attention, log-probs"]["measured"] < 1e-5
    assert 0 < found["branches of one sequence, log-probs"]["measured"] < 1e-5
    assert "PASS  refit, probe of moved weights" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["machine"]["versions"]["torch"]


@pytest.mark.distributed
def test_under_torchrun_one_rank_tells_and_all_end_with_its_verdict(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    out = tmp_path / "found.json"
    options = ["--checks", "all_reduce,fp8,context_parallel", "--json", str(out), "--min-bus-gb-s", "1e6"]
    done = run([sys.executable, *launcher, *TOOL, *options])
    assert done.returncode == 1
    found = checks_in(out)
    slow = found["all-reduce 16 MiB"]
    assert (slow["status"], slow["relation"], slow["limit"]) == ("FAIL", ">=", 1e6)
    assert 0 < slow["measured"] < 1e6
    # The others ran all the same.
    assert found["context parallel, gradients"]["status"] == "PASS" and found["fp8"]["status"] == "SKIP"
    assert done.stdout.count("context parallel, log-probs") == 1
    assert "3 passed, 1 failed, 1 skipped" in done.stdout


@pytest.mark.parametrize(
    ("body", "timeout_s", "note"),
    [
        (
            "if rank == 1: raise ValueError('a cable is loose')",
            30,
            "ValueError: a cable is loose (exit code 1",
        ),
        ("import time; time.sleep(600)", 4, "still running after 4 s"),
        ("import os; rank == 0 and os.abort()", 30, "exit code -6"),
    ],
)
def test_a_check_that_fails_or_hangs_is_one_failed_row_and_leaves_no_process(
    monkeypatch, tmp_path, body, timeout_s, note
):
    script = tmp_path / "check.py"
    measured = [{"name": "before", "status": "PASS"}]
    script.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "rank, work = int(os.environ['RANK']), Path(sys.argv[4])\n"
        "(work / f'pid{rank}').write_text(str(os.getpid()))\n"
        f"if rank == 0: (work / 'check.json').write_text({json.dumps(measured)!r})\n"
        f"{body}\n"
    )
    monkeypatch.setattr(gpu_checks_run, "TOOL", script)
    environments = rank_environments(None, num_ranks=2, alone=False, index=0)
    started = time.monotonic()
    rows = run_check("check", environments, arguments=[], work=tmp_path, timeout_s=timeout_s)
    assert time.monotonic() - started < 25
    assert [(row.name, row.status) for row in rows] == [("before", "PASS"), ("check", "FAIL")]
    assert note in rows[1].note
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


@pytest.mark.parametrize("world_size", [1, 8, 64])
def test_the_training_step_has_a_question_for_every_prompt_whatever_the_number_of_ranks(tmp_path, world_size):
    bench = Bench(file=tmp_path / "x.json", work=tmp_path, rank=0, world_size=world_size, min_bus_gb_s=None)
    config = load_config(str(write_run(bench)))
    questions = load_questions(config.data.train)
    assert config.rollout.prompts_per_step == len(questions) == 2 * world_size


def test_a_nan_fails(tmp_path):
    bench = Bench(file=tmp_path / "x.json", work=tmp_path, rank=0, world_size=1, min_bus_gb_s=None)
    bench.at_most("gap", math.nan, 1.0)
    bench.at_least("rate", math.nan, 0.0)
    assert [row.status for row in bench.rows] == ["FAIL", "FAIL"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checks", "all_reduce,fp9"], "--checks names 'fp9'; allowed: all_reduce,"),
        (["--timeout-s", "0"], "--ranks and --timeout-s must be positive"),
        (["--timeout-s", "nan"], "--ranks and --timeout-s must be positive"),
        (["--min-bus-gb-s", "-1"], "--min-bus-gb-s is -1.0; allowed: 0 or more"),
        (["--json", "/nowhere/found.json"], "--json: there is no folder /nowhere"),
        (["--keep-logs", __file__], "--keep-logs: "),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_and_exit_code_2(arguments, message):
    done = run([sys.executable, *TOOL, *arguments])
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_what_srun_started_checks_as_one_rank_at_ports_of_its_own(monkeypatch):
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)
    assert launched_environment() is None
    for name, value in (("PROCID", "9"), ("STEP_NUM_TASKS", "16"), ("LOCALID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ValueError, match="not MASTER_ADDR MASTER_PORT"):
        launched_environment()
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    launched = launched_environment()
    (environment,) = rank_environments(launched, num_ranks=0, alone=False, index=3)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["9", "16", "1"]
    # 29500 may be the launcher's own, the next one is where the copies meet.
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node-0", "29505")
    assert rank_environments(launched, num_ranks=0, alone=True, index=0) == []
