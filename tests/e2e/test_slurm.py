"""The jobs of slurm/ on a real Slurm with two nodes and a spare node on this machine (slurm/dev_cluster.sh)."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from faults.chain import differences
from faults.harness import metrics_of, rollouts_of, write_inputs
from safetensors.torch import load_file

from a2tgpo.search.index_build import build_bm25

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="needs root and Debian's slurm-wlm and munge",
    ),
]
TRAINING = ("train_70b", "train_30b_a3b", "train_8b", "train_4b", "smoke_cpu")
SMALL = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
"""Options that request the resources of this machine's nodes instead of a script's GPUs."""
STEPS = 8
LEFT_BY_ANOTHER_JOB = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "9",
    "PET_NNODES": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
"""Variables that a shell inside a torchrun job exports."""
QWEN_72B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def write_hole(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Write a safetensors file of bfloat16 tensors that takes no space on the disk: a header and a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    os.truncate(path, 8 + len(content) + end)


class Ended(NamedTuple):
    record: dict[str, str]
    """The output of `scontrol show job`."""
    log: str


class Cluster:
    """A cluster and its jobs. Partition `main` has the nodes n1 and n2, and partition `spare` also has n3."""

    def __init__(self, root: Path):
        self.root = root
        place = root / "slurm"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.environment |= {"SLURM_DEV_DIR": str(place), "SLURM_CONF": str(place / "slurm.conf")}
        self.environment["PYTHON"] = sys.executable

    def run(
        self, *command: str, check: bool = True, folder: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(
        self,
        script: str,
        *arguments: str,
        options: Sequence[str] = (),
        folder: Path = ROOT,
        **environment: str,
    ) -> str:
        out = f"--output={self.root}/%j.log"
        command = ["sbatch", "--parsable", out, *options, f"slurm/{script}.sh", *arguments]
        return self.run(*command, folder=folder, **environment).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        shown = self.run("scontrol", "show", "job", number, "--oneliner").stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def log(self, number: str) -> str:
        path = self.root / f"{number}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, number: str, *, timeout_s: float = 400) -> dict[str, str]:
        """Wait until the job has ended permanently, and return its record."""
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


def commit_all(checkout: Path) -> str:
    """Commit all files in `checkout`, and return the name of the commit."""
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "state"]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    shown = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True
    )
    return shown.stdout.strip()


class Disturbed(NamedTuple):
    """Two equal jobs. One runs undisturbed. The other is requeued while the files of its checkout are changed."""

    whole: Ended
    cut: Ended
    second: Ended
    """A job for the same run as the first job, submitted while the first job ran."""
    runs: Path
    checkout: Path
    commits: tuple[str, str]
    """Commits of the checkout before and after the changes."""


@pytest.fixture(scope="module")
def disturbed(cluster, inputs, tmp_path_factory) -> Disturbed:
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("a2tgpo", "configs", "launch", "slurm", "tools"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / ".gitignore").write_text("runs\n__pycache__\n")
    before = commit_all(checkout)
    config = checkout / "run.yaml"
    config.write_text(inputs.read_text())

    def submit(name: str, *options: str, resume: str = "auto") -> str:
        settings = [str(config), f"run.steps={STEPS}", f"run.name={name}", "--resume", resume]
        return cluster.submit("smoke_cpu", *settings, options=["--oversubscribe", *options], folder=checkout)

    whole, cut = submit("whole"), submit("cut", resume="none")
    copies = checkout / "runs" / "slurm"
    cluster.wait_until((copies / whole / "config.yaml").exists, whole)
    cluster.run(
        "scontrol", "suspend", whole
    )  # otherwise it may end before a slow machine has started the second job
    second = submit("whole", "--nodes=1", "--hold")
    time.sleep(1.1)  # Slurm's times are whole seconds
    (checkout / "configs" / "edited.yaml").write_text("{}\n")
    cluster.run("scontrol", "release", second)
    # The three jobs copy all files that they need from the checkout before they build a model.
    cluster.wait_until((copies / cut / "config.yaml").exists, cut)
    cluster.wait_until(lambda: "edited after" in cluster.log(second), second)
    # Edit the same files for another experiment.
    config.write_text(
        inputs.read_text().replace("name: run", "name: next").replace("lr: 0.0001", "lr: 0.001")
    )
    with (checkout / "slurm" / "job.sh").open("a") as stream:
        stream.write('train() { fail "this is the job script of another commit"; }\n')
    (checkout / "a2tgpo" / "trainer.py").write_text(
        "raise SystemExit('this is the code of another commit')\n"
    )
    after = commit_all(checkout)
    cluster.wait_until(lambda: f"step 2/{STEPS}" in cluster.log(cut), cut)
    cluster.run("scancel", "--signal=USR1", cut)
    cluster.wait(second)
    cluster.run("scontrol", "resume", whole)
    ended = [Ended(cluster.wait(job), cluster.log(job)) for job in (whole, cut, second)]
    return Disturbed(*ended, inputs.parent, checkout, (before, after))


def test_a_preempted_job_of_two_nodes_saves_requeues_and_ends_as_an_undisturbed_one(disturbed):
    done, log = disturbed.cut
    assert (done["JobState"], done["Restarts"], done["NumNodes"]) == ("COMPLETED", "1", "2"), log[-3000:]
    assert re.search(r"stopped after step \d of 8: SIGUSR1; saved as", log), log[-3000:]
    assert "slurm: ended with 75 after step" in log
    assert disturbed.whole.record["JobState"] == "COMPLETED", disturbed.whole.log[-3000:]
    runs = [disturbed.runs / name for name in ("whole", "cut")]
    assert differences(metrics_of(runs[1]), metrics_of(runs[0]), STEPS) == []
    assert rollouts_of(runs[1]) == rollouts_of(runs[0])
    assert not list(disturbed.runs.glob("*.previous_*")), "--resume none was obeyed again after the requeue"
    job = disturbed.checkout / "runs" / "slurm" / disturbed.cut.record["JobId"]
    assert len(list(job.glob("rank_?.log"))) == 2


def test_a_requeued_job_goes_on_as_it_was_started_and_says_what_has_changed_since(disturbed):
    log, (before, after) = disturbed.cut.log, disturbed.commits
    assert f"slurm: this folder is now at {after}; the job continues with the code of its first start" in log
    assert "update.lr 0.0001 -> 0.001" in log and "are ignored" in log, log[-3000:]
    run = disturbed.runs / "cut"
    assert (run / "config.1.yaml").read_text() == (run / "config.2.yaml").read_text()
    for number in (1, 2):
        assert f"\ncommit {before}\n" in (run / f"env.{number}.txt").read_text()
    assert not (disturbed.runs / "next").exists()
    script = disturbed.checkout / "runs" / "slurm" / disturbed.cut.record["JobId"] / "code" / "job_script.sh"
    assert script.read_text() == (ROOT / "slurm" / "smoke_cpu.sh").read_text()


def test_a_job_says_at_its_first_start_what_was_edited_after_its_submission(disturbed):
    log = disturbed.whole.log
    (line,) = [line for line in log.splitlines() if line.startswith("slurm: first start:")]
    assert f"code, {disturbed.commits[0]}, and its configuration" in line
    assert "edited after" not in log, log
    (line,) = [line for line in disturbed.second.log.splitlines() if "edited after" in line]
    assert re.fullmatch(
        r"slurm: edited after the job was submitted \(\S+\), and used: configs/edited.yaml", line
    )


def test_the_convert_job_makes_a_hugging_face_folder_of_a_jobs_checkpoint(
    cluster, disturbed, inputs, tmp_path
):
    out = tmp_path / "trained"
    checkpoint = disturbed.runs / "whole" / "checkpoints" / f"step_{STEPS}"
    job = cluster.submit(
        "convert", "megatron-to-hf", "--in", str(checkpoint), "--out", str(out), options=SMALL
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)[-3000:]
    trained, before = (load_file(folder / "model.safetensors") for folder in (out, inputs.parent / "model"))
    assert {name: w.shape for name, w in trained.items()} == {name: w.shape for name, w in before.items()}
    assert any((trained[name] != weight).any() for name, weight in before.items()), "it was trained"
    assert (out / "agent.json").is_file()


def test_a_second_job_in_a_runs_folder_is_refused_with_the_number_of_the_first(disturbed):
    record, log = disturbed.second
    assert record["ExitCode"] == "2:0", log[-3000:]
    (line,) = [line for line in log.splitlines() if line.startswith("error:")]
    assert "whole is in use by process " in line
    assert f"(Slurm job {disturbed.whole.record['JobId']})" in line


def test_a_dry_run_of_the_70b_job_goes_through_its_own_script(cluster, inputs, tmp_path):
    model = tmp_path / "72b"
    shutil.copytree(inputs.parent / "model", model)
    (model / "config.json").write_text(json.dumps(QWEN_72B))
    hidden, ffn = QWEN_72B["hidden_size"], QWEN_72B["intermediate_size"]
    write_hole(
        model / "model.safetensors",
        {
            "model.embed_tokens.weight": (QWEN_72B["vocab_size"], hidden),
            "lm_head.weight": (QWEN_72B["vocab_size"], hidden),
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


@pytest.mark.parametrize("script", [*TRAINING, "warmstart", "retrieval", "evaluate", "convert"])
def test_slurm_would_take_the_script(cluster, script):
    done = cluster.run("sbatch", "--test-only", *SMALL, f"slurm/{script}.sh")
    assert "to start at" in done.stderr


def write_program(path: Path, body: str) -> str:
    """Write a program that each rank runs instead of Python, and return its path."""
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


SERVES_TWICE = """echo "1 passages, listening on http://127.0.0.1:1/retrieve"
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then exit 75; fi
if [ "${SLURM_RESTART_COUNT:-0}" = 1 ]; then exit 137; fi"""
ENDINGS = {"saves, 0": "exit 75", "saves, 1": "exit 75", "fails, 1": "exit 3", "is done, 1": "exit 0"}
"""Maps the behaviour of the ranks and MAX_REQUEUES to the program that each rank runs."""
ONE_STEP_A_START = """started=${SLURM_RESTART_COUNT:-0}
echo "step $((started + 1))/3"
if [ "$started" -lt 2 ]; then exit 75; fi"""
TELLS = (
    'grep Cpus_allowed_list /proc/self/status\nenv\nif [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then exit 75; fi'
)


@pytest.fixture(scope="module")
def stub_jobs(cluster, tmp_path_factory) -> dict[str, Ended]:
    """Submit jobs whose ranks are shell scripts, and return how each job ended, by name."""
    folder = tmp_path_factory.mktemp("programs")
    one_node = ["--nodes=1", "--oversubscribe"]
    jobs = {}
    for name, body in ENDINGS.items():
        program = write_program(folder / name.replace(", ", "-"), body)
        jobs[name] = cluster.submit(
            "smoke_cpu", options=one_node, PYTHON=program, MAX_REQUEUES=name.rpartition(" ")[2]
        )
    program = write_program(folder / "serves", SERVES_TWICE)
    jobs["serves"] = cluster.submit(
        "retrieval",
        "--corpus",
        "none",
        options=["--ntasks=1", "--cpus-per-task=1"],
        PYTHON=program,
        MAX_REQUEUES="1",
    )
    program = write_program(folder / "one_step", ONE_STEP_A_START)
    number = cluster.submit("smoke_cpu", options=[*one_node, "--hold"], PYTHON=program, MAX_REQUEUES="1")
    earlier = ROOT / "runs" / "slurm" / number
    earlier.mkdir(parents=True, exist_ok=True)
    (earlier / "rank_0.log").write_text("step 500/500\n")
    (earlier / "requeues").write_text("500 1\n")
    cluster.run("scontrol", "release", number)
    jobs["has an earlier job's number"] = number
    tells = {"PYTHON": write_program(folder / "tells", TELLS), **LEFT_BY_ANOTHER_JOB}
    two_cores = [*one_node, "--cpus-per-task=2", "--array=0-1"]
    array = cluster.submit("smoke_cpu", options=two_cores, SLURM_CPU_BIND="cores", **tells)
    jobs |= {f"task {task} of an array": f"{array}_{task}" for task in range(2)}
    inherited = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": "0"}
    jobs["submitted by a task of an array"] = cluster.submit(
        "smoke_cpu", options=one_node, **tells, **inherited
    )
    return {
        name: Ended(cluster.wait(number), cluster.log(cluster.job(number)["JobId"]))
        for name, number in jobs.items()
    }


def test_a_retrieval_server_is_started_again_at_its_time_limit_and_when_it_dies(stub_jobs):
    record, log = stub_jobs["serves"]
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "2"), log
    assert "slurm: the server ended with 137" in log and log.count("requeued") == 2


@pytest.mark.parametrize(
    ("name", "state", "said", "restarts"),
    [
        ("saves, 0", "FAILED", "0 requeues without a step after 0: not requeued", "0"),
        ("saves, 1", "FAILED", "1 requeues without a step after 0: not requeued", "1"),
        ("fails, 1", "FAILED", "slurm: ended with 3; see runs/slurm/", "0"),
        ("is done, 1", "COMPLETED", "", "0"),
    ],
)
def test_only_what_was_saved_is_started_again_and_not_for_ever(stub_jobs, name, state, said, restarts):
    record, log = stub_jobs[name]
    assert (record["JobState"], record["Restarts"]) == (state, restarts) and said in log, log


def test_steps_and_requeues_of_an_earlier_job_of_the_same_number_do_not_count(stub_jobs):
    record, log = stub_jobs["has an earlier job's number"]
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "2"), log


@pytest.mark.parametrize(
    "name", ["task 0 of an array", "task 1 of an array", "submitted by a task of an array"]
)
def test_a_job_that_belongs_to_an_array_or_comes_from_one_requeues_itself_alone(stub_jobs, name):
    record, log = stub_jobs[name]
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), log


def test_each_rank_has_the_cores_that_the_job_asked_for(stub_jobs):
    _, log = stub_jobs["task 0 of an array"]
    assert re.findall(r"^Cpus_allowed_list:\s+(\S+)", log, re.MULTILINE) == ["0-1", "0-1"], log


def test_variables_of_another_jobs_launcher_do_not_reach_the_ranks(stub_jobs):
    _, log = stub_jobs["submitted by a task of an array"]
    assert "\nSLURM_PROCID=0" in log
    assert [name for name in LEFT_BY_ANOTHER_JOB if f"\n{name}=" in log] == []


LOST = """if [ "${{SLURM_RESTART_COUNT:-0}}" != 0 ]; then exit 0; fi
touch {folder}/started-$SLURM_JOB_ID-$SLURM_PROCID
until [ -e {folder}/lost ]; do sleep 0.1; done
exit 9"""
"""The program of a rank that fails as soon as a node is lost, and succeeds when it is started again."""


def test_a_lost_node_is_excluded_only_where_the_partition_has_another(cluster, tmp_path):
    program = write_program(tmp_path / "program", LOST.format(folder=tmp_path))
    two_of_three = ["--oversubscribe", "--partition=spare"]
    jobs = {
        "no spare": cluster.submit("smoke_cpu", options=["--oversubscribe"], PYTHON=program),
        "spare": cluster.submit("smoke_cpu", options=two_of_three, PYTHON=program),
        "spare excluded": cluster.submit(
            "smoke_cpu", options=[*two_of_three, "--exclude=n3"], PYTHON=program
        ),
        "required by name": cluster.submit(
            "smoke_cpu", options=[*two_of_three, "--nodelist=n1,n2"], PYTHON=program
        ),
    }
    first, *_ = jobs.values()

    def records() -> dict[str, dict[str, str]]:
        return {name: cluster.job(number) for name, number in jobs.items()}

    def until(condition: Callable[[], bool]) -> None:
        cluster.wait_until(condition, first, 120)

    until(lambda: len(list(tmp_path.glob("started-*"))) == 8)
    assert {record["NodeList"] for record in records().values()} == {"n[1-2]"}
    cluster.run("bash", "-c", "kill $(cat $SLURM_DEV_DIR/slurmd-n2.pid)")
    (tmp_path / "lost").touch()
    until(lambda: all("requeued" in cluster.log(number) for number in jobs.values()))
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    spare = cluster.wait(jobs["spare"])
    assert (spare["JobState"], spare["NodeList"], spare["ExcNodeList"]) == ("COMPLETED", "n[1,3]", "n2")
    assert "slurm: ended with 9 after step 0; requeued without n2" in cluster.log(jobs["spare"])
    waiting = {name: record for name, record in records().items() if name != "spare"}
    for name, record in waiting.items():
        assert record["JobState"] == "PENDING" and record["Priority"] != "0", (name, record)
        assert "n2 is not excluded, since the job could not start without it" in cluster.log(jobs[name])
    cluster.run("bash", "-c", "slurmd -c -N n2 -f $SLURM_CONF")  # the node comes back
    for name, excluded in {
        "no spare": "(null)",
        "spare excluded": "n3",
        "required by name": "(null)",
    }.items():
        done = cluster.wait(jobs[name], timeout_s=120)
        assert (done["JobState"], done["NodeList"], done["Restarts"]) == ("COMPLETED", "n[1-2]", "1"), done
        assert done["ExcNodeList"] == excluded


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
    assert twice["JobState"] == "FAILED" and "0 requeues without a step after 0" in told, told
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


def test_an_index_in_parts_is_served_by_all_nodes_of_the_training_and_asked_as_one(cluster, inputs):
    corpus, parts = inputs.parent / "corpus.jsonl", inputs.parent / "parts"
    for part in range(2):
        build_bm25(corpus, parts / f"part-{part}", part=(part, 2))
    settings = {"RETRIEVAL_CORPUS": str(corpus), "RETRIEVAL_INDEX": str(parts), "RETRIEVAL_SHARDS": "1"}
    job = cluster.submit(
        "smoke_cpu",
        str(inputs),
        "run.name=served",
        "run.steps=1",
        "tools.outage_limit_s=60",  # below this configuration's parallel.timeout_s
        **settings,
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)[-3000:]
    assert cluster.log(job).count("slurm: retrieval server at http://127.0.0.1:") == 3
    logs = ROOT / "runs" / "slurm" / job
    served = [(logs / f"{name}.log").read_text() for name in ("shard_0", "shard_1", "retrieval")]
    numbers = [re.findall(r"^(\d+) passages, listening on", log, re.MULTILINE) for log in served]
    assert numbers == [["3"], ["3"], ["6"]], served
    resolved = (inputs.parent / "served" / "config.yaml").read_text()
    assert "backend: http" in resolved
    missing = cluster.submit("smoke_cpu", str(inputs), RETRIEVAL_CORPUS="/nowhere.jsonl")
    assert cluster.wait(missing)["ExitCode"] == "2:0"
    assert "RETRIEVAL_CORPUS is /nowhere.jsonl" in cluster.log(missing)
    fewer = cluster.submit("smoke_cpu", str(inputs), options=["--nodes=1"], **settings)
    assert cluster.wait(fewer)["ExitCode"] == "2:0" and "more parts than the 1 nodes" in cluster.log(fewer)
