"""The check of a new cluster, without a GPU: its results, and the faults that it finds."""

import json
import math
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import gpu_check
import plan
import pytest
from preloaded.command import PYTHON

from a2tgpo.config.load import load_config
from a2tgpo.data.question_set import load_questions
from a2tgpo.io.errors import ConfigError

from gpu_checks import hardware_table, machine, step
from gpu_checks import run as gpu_checks_run
from gpu_checks.bench import Bench, Settings
from gpu_checks.launch import launched_environment, rank_environments
from gpu_checks.models import slice_dimensions
from gpu_checks.run import run_check
from gpu_checks.step import write_run

ROOT = Path(__file__).resolve().parents[3]
TOOL = [str(ROOT / "tools" / "gpu_check.py")]
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NEEDS_GPU = {
    *("fp8", "slice in fp8", "memory freed on the card", "engine_memory", "async scheduling"),
    *("engine prefill of the slice", "fp8_rollout_step", "fp8_trainer_step", "fp8_step"),
}


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Run a command as from a terminal, without variables that a process group of another test may have left."""
    mine = {key: value for key, value in os.environ.items() if key not in LAUNCHER_NAMES}
    return subprocess.run(
        command, env=mine | environment, capture_output=True, text=True, timeout=850, check=False
    )


def results_in(file: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(file.read_text())["checks"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Run all checks once on this machine's CPUs. Return the folder of the results and the terminal's text."""
    folder = tmp_path_factory.mktemp("rehearsal")
    options = ["--lengths", "1,17,130", "--vllm-logging", "INFO", "--keep-logs", str(folder / "logs")]
    done = run([PYTHON, *TOOL, "--json", str(folder / "found.json"), *options])
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.distributed
def test_on_a_cpu_what_has_a_meaning_passes_and_the_rest_says_why_not(rehearsal):
    folder, text = rehearsal
    found = results_in(folder / "found.json")
    assert {name for name, row in found.items() if row["status"] == "SKIP"} == NEEDS_GPU
    assert all(found[name]["note"].startswith("needs a GPU: ") for name in NEEDS_GPU)
    assert {row["status"] for row in found.values()} == {"PASS", "INFO", "SKIP"}
    assert f"0 failed, {len(NEEDS_GPU)} skipped" in text.splitlines()[-1]
    # These checks compare two ways of computing. No difference at all would mean that one was compared with itself.
    for name in ("packed attention", "wide heads", "slice in bfloat16", "context parallel"):
        assert found[f"{name}, log-probs"]["measured"] > 0, name
    assert "lengths 1,17,130" in found["wide heads, log-probs"]["note"]
    assert "464 feed-forward channels" in found["slice in bfloat16, log-probs"]["note"]
    for number in (1, 2):
        for what in ("sampled tokens", "gain scores"):
            assert 0 < found[f"step {number}, {what}, engine - trainer"]["measured"] < 1e-4
    for name in ("same updates twice", "all left and came back"):
        assert found[f"{name}, tensors that differ"]["note"].startswith("of 68"), name
    assert (
        "metrics, rollouts and checkpoint"
        in found["resumed run, values that differ from the unbroken one"]["note"]
    )


@pytest.mark.distributed
def test_the_engines_messages_are_kept_on_demand(rehearsal):
    logs = rehearsal[0] / "logs"
    assert "INFO" in (logs / "engine_speed.0.log").read_text()
    assert {"all_reduce.1.log", "resume.0.log"} <= {log.name for log in logs.iterdir()}


@pytest.mark.distributed
def test_the_file_tells_machine_settings_and_seconds_and_becomes_a_table(rehearsal, capsys):
    file = rehearsal[0] / "found.json"
    content = json.loads(file.read_text())
    assert content["unfinished"] == [] and content["machine"]["versions"]["torch"]
    assert content["settings"]["lengths"] == [1, 17, 130]
    assert list(content["seconds"]) == list(gpu_check.CHECKS)
    assert hardware_table.main([str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | CPU only |"
    assert any(line.startswith("| `memory` | 3 passed, 1 skipped; ") for line in lines)
    assert any(line.startswith("| one engine step of one sequence of a tiny model, ms | ") for line in lines)


@pytest.mark.distributed
def test_a_plan_refuses_a_cpus_figures_and_takes_a_cards(rehearsal, tmp_path, capsys):
    config = str(ROOT / "configs" / "train_8b.yaml")
    file = rehearsal[0] / "found.json"
    assert plan.main([config, "--model", "qwen3-8b", "--measured", str(file)]) == 2
    assert "was measured without a GPU" in capsys.readouterr().err
    content = json.loads(file.read_text())  # this machine's rows, presented as a GPU's
    content["machine"] |= {"gpu_name": "NVIDIA H100 80GB HBM3", "gpu_memory_gib": 79.25}
    tflops = results_in(file)["slice in bf16, forward and backward"]["measured"]
    (tmp_path / "card.json").write_text(json.dumps(content))
    out = tmp_path / "plan.json"
    options = ["--model", "qwen3-8b", "--measured", str(tmp_path / "card.json"), "--json", str(out)]
    plan.main([config, *options])
    assert "instead of 0.45" in capsys.readouterr().out
    assumed = json.loads(out.read_text())["assumptions"]
    assert assumed["compute_utilisation"] == pytest.approx(tflops / 989)
    assert assumed["prefill_utilisation"] == 0.4  # not measured without a GPU


@pytest.mark.distributed
def test_under_torchrun_one_rank_tells_and_all_end_with_its_verdict(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    out = tmp_path / "found.json"
    options = [
        "--checks",
        "memory,fp8,context_parallel,all_reduce",
        "--json",
        str(out),
        "--min-bus-gb-s",
        "1e6",
    ]
    done = run([PYTHON, *launcher, *TOOL, *options, "--timeout-s", "memory=0.5"])
    assert done.returncode == 1
    found = results_in(out)
    slow = found["all-reduce 16 MiB"]
    assert (slow["status"], slow["relation"], slow["limit"]) == ("FAIL", ">=", 1e6)
    assert 0 < slow["measured"] < 1e6
    assert found["memory"]["note"] == "still running after 0.5 s (--timeout-s)"
    # The other checks still ran.
    assert found["context parallel, gradients"]["status"] == "PASS" and found["fp8"]["status"] == "SKIP"
    assert done.stdout.count("context parallel, log-probs") == 1
    assert "2 passed, 2 failed, 1 skipped, 2 measured" in done.stdout


@pytest.mark.distributed
def test_what_was_measured_before_the_tool_is_ended_is_in_the_file(tmp_path):
    out = tmp_path / "found.json"
    command = [PYTHON, *TOOL, "--checks", "all_reduce,training_step", "--json", str(out)]
    mine = {key: value for key, value in os.environ.items() if key not in LAUNCHER_NAMES}
    process = subprocess.Popen(command, env=mine, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not out.exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert results_in(out)["all-reduce 16 MiB"]["status"] == "PASS"
    assert json.loads(out.read_text())["unfinished"] == ["training_step"]


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
    measured = [{"check": "check", "name": "before", "status": "PASS"}]
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
    rows = run_check("check", environments, settings=Settings(), work=tmp_path, timeout_s=timeout_s)
    assert [(row.name, row.status) for row in rows] == [("before", "PASS"), ("check", "FAIL")]
    assert note in rows[1].note
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


@pytest.mark.parametrize("world_size", [1, 8, 64])
def test_the_training_step_has_a_question_for_every_prompt_of_any_number_of_ranks(tmp_path, world_size):
    bench = Bench(check="step", work=tmp_path, rank=0, world_size=world_size)
    config = load_config(str(write_run(bench)))
    questions = load_questions(config.data.train)
    assert config.rollout.prompts_per_step == len(questions) == 2 * world_size


def test_the_settings_of_an_fp8_step_are_valid_and_switch_fp8_on(tmp_path):
    bench = Bench(check="step", work=tmp_path, rank=0, world_size=1)
    config = load_config(str(write_run(bench, step.CORRECTION, step.FP8_ROLLOUT, step.FP8_TRAINER)))
    assert config.model.fp8.enabled and config.rollout.quantization == "fp8_per_channel"
    assert config.rollout.gain.verify_every == 1 and config.algorithm.correction.kind == "truncate"


def test_a_nan_fails_and_is_null_in_the_file(tmp_path):
    bench = Bench(check="any", work=tmp_path, rank=0, world_size=1)
    bench.at_most("gap", math.nan, 1.0)
    bench.at_least("rate", math.nan, 0.0)
    assert [row.status for row in bench.rows] == ["FAIL", "FAIL"]
    kept = json.loads((tmp_path / "any.json").read_text(), parse_constant=pytest.fail)
    assert [row["measured"] for row in kept] == [None, None]


def test_a_slice_has_the_shapes_of_one_rank_of_the_large_model():
    found = slice_dimensions(None, tensor=8, layers=4, on_gpu=True)
    assert (found.hidden, found.ffn, found.heads, found.kv_heads, found.head_dim) == (8192, 3696, 8, 1, 128)
    assert found.ffn % 128 and found.layers == 4 and found.architecture == "qwen2"
    folder = ROOT / "artifacts" / "models" / "tiny-qwen3"
    assert slice_dimensions(str(folder), tensor=1, layers=1, on_gpu=False).architecture == "qwen3"
    with pytest.raises(ConfigError, match="--like is 'qwen3-30b-a3b'; allowed: a model without experts"):
        slice_dimensions("qwen3-30b-a3b", tensor=2, layers=1, on_gpu=True)


def test_a_time_limit_of_one_check_is_stronger_than_one_of_all():
    limits = gpu_check._limits(["memory=7", "900,fp8=30"])
    assert limits == dict.fromkeys(gpu_check.CHECKS, 900.0) | {"memory": 7.0, "fp8": 30.0}
    assert gpu_check._limits([]) == {name: check.timeout_s for name, check in gpu_check.CHECKS.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checks", "all_reduce,fp9"], "--checks names 'fp9'; allowed: all_reduce,"),
        (["--timeout-s", "0"], "--timeout-s is '0'; allowed: positive seconds"),
        (["--timeout-s", "nan"], "--timeout-s is 'nan'; allowed: positive seconds"),
        (["--timeout-s", "fp9=3"], "--timeout-s names 'fp9'; allowed: all_reduce,"),
        (["--ranks", "-1"], "--ranks must be positive"),
        (["--min-bus-gb-s", "-1"], "--min-bus-gb-s is -1.0; allowed: 0 or more"),
        (["--lengths", "1,,3"], "--lengths is '1,,3'; allowed: integers from 1"),
        (["--like", "qwen9"], "--like is 'qwen9'; allowed: a folder with config.json, or a name"),
        (["--tensor", "3"], "--tensor is 3; allowed: a divisor of the model's 64 attention heads"),
        (["--layers", "81"], "--layers is 81; allowed: 1 to 80, the model's"),
        (["--vllm-logging", "INFO"], "--vllm-logging needs --keep-logs FOLDER"),
        (["--json", "/nowhere/found.json"], "--json: there is no folder /nowhere"),
        (["--keep-logs", __file__], "--keep-logs: "),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", ["{", "[]", '{"machine": {"time": ""}, "seconds": {}, "checks": [1]}'])
def test_a_table_of_another_file_is_refused_in_one_line(tmp_path, capsys, text):
    (tmp_path / "x.json").write_text(text)
    assert hardware_table.main([str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.endswith("x.json is not what tools/gpu_check.py --json writes\n")


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
    # The launcher may use 29500, and the copies use 29501 for rendezvous.
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node-0", "29505")
    assert rank_environments(launched, num_ranks=0, alone=True, index=0) == []


def test_a_driver_that_is_too_old_fails_and_another_toolkit_is_a_warning():
    too_old = "torch sees no GPU, but there is nvidia0: the driver is 570.1, and CUDA 13.0 needs 580 or newer"
    found = {
        "python": "3.12.3",
        "versions": {},
        "gpus": ["NVIDIA H100"],
        "gpus_seen_by_torch": 0,
        "unusable": [too_old],
        "warnings": ["CUDA_HOME leads to /usr/local/cuda-12.4/bin/nvcc"],
        "topology": "",
    }
    row = machine.gpus_row(found)
    assert row.status == "FAIL" and row.note == f"the driver lists 1; {too_old}"
    assert "warning: CUDA_HOME leads to /usr/local/cuda-12.4" in machine.machine_text(found)
