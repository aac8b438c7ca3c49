"""The jobs of slurm/ on a real Slurm: two nodes on this machine (slurm/dev_cluster.sh)."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from chain import differences
from harness import metrics_of, rollouts_of, write_inputs

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="needs root and Debian's slurm-wlm and munge",
    ),
]
TRAINING = ("train_70b", "train_8b", "train_4b", "smoke_cpu")
SMALL = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
"""What a node of this machine has, in place of a script's GPUs."""
STEPS = 8
QWEN_72B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def write_hole(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A safetensors file of bfloat16 tensors that takes no room on the disk: a header, and a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    os.truncate(path, 8 + len(content) + end)


class Cluster:
    """Two nodes, and the jobs in them."""

    def __init__(self, root: Path):
        self.root = root
        place = root / "slurm"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.environment |= {"SLURM_DEV_DIR": str(place), "SLURM_CONF": str(place / "slurm.conf")}
        self.environment["PYTHON"] = sys.executable

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, script: str, *arguments: str, options: Sequence[str] = (), **environment: str) -> str:
        out = f"--output={self.root}/%j.log"
        command = ["sbatch", "--parsable", out, *options, f"slurm/{script}.sh", *arguments]
        return self.run(*command, **environment).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        shown = self.run("scontrol", "show", "job", number, "--oneliner").stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def log(self, number: str) -> str:
        path = self.root / f"{number}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, number: str, *, timeout_s: float = 400) -> dict[str, str]:
        """The job's record once it has ended for good."""
        return self.wait_until(
            lambda: (
                (job := self.job(number))["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
                and job
            ),
            number,
            timeout_s,
        )

    def wait_until(self, condition, number: str, timeout_s: float = 400):
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.3)
        raise AssertionError(f"job {number}: {self.job(number)}\n{self.log(number)[-3000:]}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    found.run("slurm/dev_cluster.sh", "start")
    yield found
    found.run("slurm/dev_cluster.sh", "stop")
    shutil.rmtree(ROOT / "runs" / "slurm", ignore_errors=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_job_of_two_nodes_is_preempted_saves_requeues_and_ends_as_an_undisturbed_one(cluster, inputs):
    settings = [str(inputs), f"run.steps={STEPS}"]
    whole = cluster.submit("smoke_cpu", *settings, "run.name=whole")
    cut = cluster.submit("smoke_cpu", *settings, "run.name=cut")
    cluster.wait_until(lambda: f"step 2/{STEPS}" in cluster.log(cut), cut)
    cluster.run("scancel", "--signal=USR1", cut)
    done = cluster.wait(cut)
    log = cluster.log(cut)
    assert (done["JobState"], done["Restarts"], done["NumNodes"]) == ("COMPLETED", "1", "2"), log[-3000:]
    assert re.search(r"stopped after step \d of 8: SIGUSR1; saved as", log), log[-3000:]
    assert "slurm: ended with 75 after step" in log
    assert cluster.wait(whole)["JobState"] == "COMPLETED", cluster.log(whole)[-3000:]
    runs = [inputs.parent / name for name in ("whole", "cut")]
    assert differences(metrics_of(runs[1]), metrics_of(runs[0]), STEPS) == []
    assert rollouts_of(runs[1]) == rollouts_of(runs[0])
    assert len(list((ROOT / "runs" / "slurm" / cut).glob("rank_?.log"))) == 2


def test_a_dry_run_of_the_70b_job_goes_through_its_own_script(cluster, inputs, tmp_path):
    model = tmp_path / "72b"
    shutil.copytree(inputs.parent / "model", model)
    (model / "config.json").write_text(json.dumps(QWEN_72B))
    hidden, ffn = QWEN_72B["hidden_size"], QWEN_72B["intermediate_size"]
    write_hole(
        model / "model.safetensors",
        {
            "model.embed_tokens.weight": (QWEN_72B["vocab_size"], hidden),
            "model.layers.79.self_attn.q_proj.weight": (hidden, hidden),
            "model.layers.79.mlp.gate_proj.weight": (ffn, hidden),
        },
    )
    files = {"data.train": "questions", "data.test": "questions", "search.corpus": "corpus"}
    overrides = [f"{key}={inputs.parent / name}.jsonl" for key, name in files.items()]
    overrides += [f"model.path={model}", "search.backend=bm25"]
    overrides += ["rollout.prompts_per_step=4", "update.prompts_per_minibatch=4"]  # there are few questions
    job = cluster.submit("train_70b", *overrides, options=SMALL, DRY_RUN="1")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert "tensor: 8" in cluster.log(job) and "dry run" in cluster.log(job)
    broken = cluster.submit("train_70b", *overrides, "parallel.tensor=7", options=SMALL, DRY_RUN="1")
    assert cluster.wait(broken)["ExitCode"] == "2:0"
    assert "parallel.tensor" in cluster.log(broken) and "Traceback" not in cluster.log(broken)


@pytest.mark.parametrize("script", [*TRAINING, "retrieval", "evaluate"])
def test_slurm_would_take_the_script(cluster, script):
    done = cluster.run("sbatch", "--test-only", *SMALL, f"slurm/{script}.sh")
    assert "to start at" in done.stderr


@pytest.mark.parametrize(
    ("ends_with", "max_requeues", "state", "said"),
    [
        (75, "0", "FAILED", "0 requeues, and no step after 0: not put into the queue again"),
        (75, "1", "FAILED", "1 requeues, and no step after 0: not put into the queue again"),
        (3, "1", "FAILED", "slurm: ended with 3; see runs/slurm/"),
        (0, "1", "COMPLETED", ""),
    ],
)
def test_only_what_was_saved_is_started_again_and_not_for_ever(
    cluster, tmp_path, ends_with, max_requeues, state, said
):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nexit {ends_with}\n")
    program.chmod(0o755)
    job = cluster.submit(
        "smoke_cpu", "configs/quickstart.yaml", PYTHON=str(program), MAX_REQUEUES=max_requeues
    )
    done = cluster.wait(job)
    assert done["JobState"] == state and said in cluster.log(job), cluster.log(job)
    assert done["Restarts"] == ("1" if ends_with == 75 and max_requeues == "1" else "0")


def test_a_second_signal_changes_nothing_and_a_cancelled_job_is_not_started_again(cluster, tmp_path):
    program = tmp_path / "program"
    program.write_text(
        f"#!/bin/bash\ntrap 'exit 75' TERM USR1\ntouch {tmp_path}/started\nwhile true; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    started = tmp_path / "started"
    jobs = []
    for command in (["--signal=USR1", "--batch"], []):
        job = cluster.submit(
            "smoke_cpu",
            "configs/quickstart.yaml",
            options=["--nodes=1"],
            PYTHON=str(program),
            MAX_REQUEUES="0",
        )
        cluster.wait_until(started.exists, job)
        started.unlink()
        cluster.run("scancel", *command, job)
        if command:
            time.sleep(0.7)
            cluster.run("scancel", *command, job, check=False)
        jobs.append((cluster.wait(job), cluster.log(job)))
    (twice, told), (cancelled, quiet) = jobs
    assert twice["JobState"] == "FAILED" and "0 requeues, and no step after 0" in told, told
    assert cancelled["JobState"] == "CANCELLED" and "requeue" not in quiet, quiet


def test_arguments_reach_the_program_as_they_are(cluster, tmp_path):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nprintf "<%s>\\n" "$@"\n')
    program.chmod(0o755)
    config = tmp_path / "a run; touch evil.yaml"
    config.write_text("run: {name: a}\n")
    nasty = ["run.name=$(touch evil)", "data.instructions=a 'b' \"c\" `touch evil` ; exit 7 #", "x=*"]
    job = cluster.submit("smoke_cpu", str(config), *nasty, PYTHON=str(program))
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert all(f"<{argument}>" in cluster.log(job) for argument in [str(config), *nasty])
    assert not list(ROOT.glob("evil*"))


def test_a_retrieval_server_is_started_beside_the_training_and_asked_for_its_health(cluster, inputs):
    job = cluster.submit(
        "smoke_cpu",
        str(inputs),
        "run.name=served",
        "run.steps=1",
        RETRIEVAL_CORPUS=str(inputs.parent / "corpus.jsonl"),
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)[-3000:]
    assert "slurm: retrieval server at http://127.0.0.1:" in cluster.log(job)
    resolved = (inputs.parent / "served" / "config.yaml").read_text()
    assert "backend: http" in resolved
    missing = cluster.submit("smoke_cpu", str(inputs), RETRIEVAL_CORPUS="/nowhere.jsonl")
    assert cluster.wait(missing)["ExitCode"] == "2:0" and "RETRIEVAL_CORPUS is /nowhere.jsonl" in cluster.log(
        missing
    )
