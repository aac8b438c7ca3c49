"""From nothing to a trained, evaluated, exported agent, by the commands that README gives."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

pytestmark = pytest.mark.e2e


class Commands:
    """Runs programs as a user does, in the repository's folder."""

    def __init__(self):
        self.environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def __call__(self, *arguments, timeout=300, code=0) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments] if str(arguments[0]).endswith(".py") else arguments
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == code, (
            f"{arguments}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
        return done


@pytest.fixture(scope="module")
def run() -> Commands:
    return Commands()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def server(run, work):
    """worldqa prepared, its index built and served; the endpoint's address."""
    data = work / "worldqa"
    sizes = ["--train-questions", "300", "--test-questions", "60", "--demonstrations", "1500"]
    run("tools/prepare_data.py", "worldqa", "--out", data, *sizes)
    run("tools/build_index.py", "bm25", "--corpus", data / "corpus.jsonl", "--out", work / "index")
    command = [sys.executable, "tools/retrieval_server.py", "--corpus", data / "corpus.jsonl"]
    command += ["--index", work / "index", "--port", "0"]
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=run.environment, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    yield re.search(r"http://\S+", line).group()
    process.terminate()
    assert process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def trained(run, work, server) -> Path:
    """Folder of a run of two steps, from a short warm start, that searched over HTTP."""
    data = work / "worldqa"
    run("tools/prepare_model.py", "tiny", "--data", data, "--out", work / "cold")
    settings = [
        "configs/quickstart.yaml",
        f"run.root={work / 'runs'}",
        f"model.path={work / 'warm'}",
        f"data.train={data / 'train.jsonl'}",
        f"data.test={data / 'test.jsonl'}",
        "search.backend=http",
        f"search.url={server}",
        f"warmstart.source={work / 'cold'}",
        f"warmstart.demonstrations={data / 'demonstrations.jsonl'}",
        "warmstart.steps=60",
        "run.steps=2",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "update.prompts_per_minibatch=2",
        "evaluation.max_questions=6",
        "evaluation.every=0",
        "evaluation.at_start=false",
    ]
    run("launch/local.sh", "-n", "2", "--script", "launch/warmstart.py", *settings)
    run("launch/local.sh", "-n", "2", *settings)
    return work / "runs" / "quickstart"


@pytest.fixture(scope="module")
def exported(run, work, trained) -> Path:
    out = work / "exported"
    run("tools/convert.py", "megatron-to-hf", "--in", trained / "checkpoints" / "step_2", "--out", out)
    return out


def test_the_trained_agent_searched_the_server(trained, server):
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2 and metrics[-1]["tools/failures"] == 0
    assert sum(record.get("tools/search_calls", 0) for record in metrics) > 0
    assert httpx.get(server.replace("/retrieve", "/health")).json()["status"] == "ok"


def test_a_checkpoint_and_its_export_score_the_same_on_two_ranks_and_one(run, trained, exported):
    config = trained / "config.yaml"
    run(
        *("launch/local.sh", "-n", "2", "--script", "tools/evaluate.py", config),
        *("--checkpoint", trained / "checkpoints" / "step_2", "--limit", "21", "--samples", "2"),
    )
    run(
        *("tools/evaluate.py", "--config", config, "--checkpoint", exported, "--limit", "21"),
        *("--sets", f"worldqa={trained.parents[1] / 'worldqa' / 'test.jsonl'}"),
    )
    reports = trained / "evaluation"
    whole = json.loads((reports / "step_2" / "report.json").read_text())
    other = json.loads((reports / "exported" / "report.json").read_text())
    assert whole["step"] == 2 and whole["average"]["num_questions"] == 21
    assert set(whole["average"]["pass_at"]["exact_match"]) == {"1", "2"}

    def greedy(folder):
        lines = [json.loads(line) for line in (reports / folder / "answers.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == "greedy"]

    assert greedy("step_2") == greedy("exported"), "the export answers otherwise than the checkpoint"
    for name in ("em", "em_format_gated", "f1", "tool_calls"):
        assert whole["average"][name] == other["average"][name]
    assert (reports / "step_2" / "report.md").read_text().count("| worldqa |") >= 2
    assert list((reports / "step_2" / "tensorboard").iterdir())


def test_the_export_comes_back_as_a_checkpoint_with_the_same_weights(work, trained, exported, monkeypatch):
    from safetensors.torch import load_file

    from tools import convert

    again = work / "again"
    for arguments in (
        ("hf-to-megatron", "--in", exported, "--out", work / "back"),
        ("megatron-to-hf", "--in", work / "back", "--out", again),
    ):
        command = ["convert.py", "--config", trained / "config.yaml", *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        assert convert.main() == 0
    mine, theirs = load_file(exported / "model.safetensors"), load_file(again / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)


def test_the_export_computes_in_transformers_what_the_checkpoint_answers(trained, exported):
    """The engine's greedy answers, token by token, are those of transformers on the exported folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    report = trained / "evaluation" / "step_2" / "answers.jsonl"
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    direct = [
        line for line in lines if line["kind"] == "greedy" and line["tool_calls"] == 0 and line["answer"]
    ]
    for line in direct[:5]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": line["question"]}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        written = tokenizer.decode(model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :])
        assert f"\\boxed{{{line['answer']}}}" in written


def test_chat_shows_turns_calls_and_results(run, trained, exported, work):
    question = json.loads((work / "worldqa" / "test.jsonl").read_text().splitlines()[0])["question"]
    done = run(
        *("tools/chat.py", "--config", trained / "config.yaml", "--checkpoint", exported),
        *("--question", question),
    )
    assert "turn 1" in done.stdout and ("answer: " in done.stdout or "no answer" in done.stdout)
    rollouts = run("tools/view_rollouts.py", trained, "--limit", "1")
    assert "turn 1" in rollouts.stdout


MISTAKES = {
    "checkpoint that is not there": (
        "tools/evaluate.py",
        ["--checkpoint", "none"],
        "--checkpoint: none is not there",
    ),
    "unknown data set": (
        "tools/evaluate.py",
        ["--checkpoint", "EXPORTED", "--sets", "squad"],
        "--sets: cannot read squad",
    ),
    "two sets of one name": (
        "tools/evaluate.py",
        ["--checkpoint", "EXPORTED", "--sets", "a=TEST,a=TEST"],
        "which is taken",
    ),
    "export that is there": (
        "tools/convert.py",
        ["megatron-to-hf", "--in", "STEP", "--out", "EXPORTED"],
        "--out is",
    ),
    "folder that is no checkpoint": (
        "tools/convert.py",
        ["megatron-to-hf", "--in", "EXPORTED", "--out", "new"],
        "--in is",
    ),
    "chat without a model": ("tools/chat.py", ["--checkpoint", "TEST"], "--checkpoint: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(work, trained, exported, mistake, monkeypatch, capsys):
    script, arguments, message = MISTAKES[mistake]
    names = {
        "EXPORTED": str(exported),
        "TEST": str(work / "worldqa" / "test.jsonl"),
        "STEP": str(trained / "checkpoints" / "step_2"),
    }
    filled = [re.sub("EXPORTED|TEST|STEP", lambda m: names[m.group()], argument) for argument in arguments]
    # In this process: an uncaught exception would be a traceback.
    tool = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [script, "--config", str(trained / "config.yaml"), *filled])
    monkeypatch.delenv("RANK", raising=False)
    assert tool.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (ROOT / "new").exists()
