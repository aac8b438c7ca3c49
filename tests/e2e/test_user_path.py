"""Run README's commands in a copy of the sources, up to a trained, evaluated and exported agent."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from clone import Clone, commands

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.e2e

SECTION = "## From nothing to an agent you can talk to"
SHORTER = {
    "tools/prepare_data.py": "--train-questions 300 --test-questions 60 --demonstrations 1500",
    "tools/retrieval_server.py": "--port 0",
    "launch/warmstart.py": "warmstart.steps=60",
    "launch/train.py": "search.url=SERVER rollout.prompts_per_step=4 rollout.group_size=4 "
    "update.prompts_per_minibatch=2 evaluation.max_questions=6 evaluation.every=0 evaluation.at_start=false",
    "tools/evaluate.py": "--limit 21",
}
"""Arguments that are appended to a documented command, so that they override it: sizes for a test, and a free
port.
"""


OPERATE = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
TYPED = [
    line.strip()
    for block in re.findall(r"^```\n(.*?)^```", OPERATE, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip() and "(cluster)" not in line
]
"""Commands of docs/operate.md that are not marked as `(cluster)`."""


def documented(section: str) -> list[list[str]]:
    """Return the words of every command in the first code block of a section of README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(section + "\n")[1]
    block = re.search(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[1]
    return commands(block)


def script_of(words: list[str]) -> str:
    scripts = [word for word in words if word.endswith(".py")]
    return scripts[0] if scripts else "launch/train.py"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Run README's commands. Yield the copy of the sources (`clone`) and the output of each script (`said`)."""
    clone, said = Clone(tmp_path_factory.mktemp("clone")), {}
    try:
        for words in documented(SECTION):
            if words[0] in ("make", "source", "kill"):
                continue
            is_server = words[-1] == "&"
            script = script_of(words)
            words = words[: -1 if is_server else None]
            words += SHORTER.get(script, "").replace("SERVER", clone.address).split()
            if is_server:
                clone.serve(words)
            else:
                said[script] = clone(words).stdout
        clone.preload()  # only now, because README's commands must run as they do for a user
        yield SimpleNamespace(clone=clone, said=said)
    finally:
        clone.close()


@pytest.fixture(scope="module")
def work(path) -> Path:
    return path.clone.folder


@pytest.fixture(scope="module")
def trained(work) -> Path:
    """Folder of the run of two steps that searches over HTTP."""
    return work / "runs" / "served"


@pytest.fixture(scope="module")
def exported(work) -> Path:
    return work / "artifacts" / "models" / "trained"


def test_the_readme_goes_from_data_to_chat(path):
    assert list(path.said) == [
        "tools/prepare_data.py",
        "tools/prepare_model.py",
        "tools/build_index.py",
        "launch/warmstart.py",
        "launch/train.py",
        "tools/evaluate.py",
        "tools/convert.py",
        "tools/chat.py",
        "tools/view_rollouts.py",
    ]
    assert [words[0] for words in documented(SECTION)].count("kill") == 1
    chat = path.said["tools/chat.py"]
    assert "turn 1" in chat and ("answer: " in chat or "no answer" in chat)
    assert (path.clone.folder / "rollouts.html").stat().st_size > 10_000


def test_the_trained_agent_searched_the_server(path, trained):
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2 and metrics[-1]["tools/failures"] == 0
    assert sum(record.get("tools/search_calls", 0) for record in metrics) > 0
    assert httpx.get(path.clone.address.replace("/retrieve", "/health")).json()["status"] == "ok"


def kill_half_way(clone: Clone, command: list[str], log: Path) -> Path:
    """Kill an evaluation, its ranks included, as soon as some of its answers are in `log`. Return a hard link to
    `log`, which remains when `log` is removed.
    """
    process = subprocess.Popen(command, cwd=clone.folder, env=clone.environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 5):
        time.sleep(0.005)
    for started in psutil.process_iter(["cmdline", "cwd"]):
        if "tools/evaluate.py" in (started.info["cmdline"] or ()) and started.info["cwd"] == str(
            clone.folder
        ):
            started.kill()
    assert process.wait() == -signal.SIGKILL, "it was over before it was killed"
    kept = log.parents[1] / "kept.jsonl"
    kept.hardlink_to(log)
    assert 5 <= kept.read_bytes().count(b"\n") < 21
    return kept


def test_a_checkpoint_cut_into_2_x_2_scores_the_same_on_two_processes_and_on_one(path, work, trained):
    """Two processes begin and are killed, and one process continues. The scores equal those of the undivided
    checkpoint in README.
    """
    cut = work / "cut.yaml"
    cut.write_text(
        f"base: {trained}/config.yaml\nparallel: {{tensor: 2, pipeline: 2}}\nrollout: {{tensor_parallel: 2}}\n"
    )
    start = ["launch/local.sh", "-n"]
    convert = ["hf-to-megatron", "--in", "artifacts/models/trained", "--out", "cut"]
    layout = ["parallel.tensor=2", "parallel.pipeline=2"]
    path.clone([*start, "4", "--script", "tools/convert.py", "cut.yaml", *convert, *layout])
    evaluate = [
        *("--script", "tools/evaluate.py", "cut.yaml", "--checkpoint", "cut", "--limit", "21"),
        *("--sets", "worldqa=artifacts/worldqa/test.jsonl", "--out", "cut/report"),
        "rollout.max_concurrent=2",  # so that the answers arrive one after the other
    ]
    log = work / "cut" / "report.partial" / "replica_0.jsonl"
    kept = kill_half_way(path.clone, [*start, "2", *evaluate], log)
    path.clone([*start, "1", *evaluate])
    asked = [json.loads(line)["question_id"] for line in kept.read_text().splitlines() if line.endswith("}")]
    assert sorted(asked) == sorted(set(asked)) and len(asked) == 21, "a question was asked twice, or never"
    reports = trained / "evaluation"
    whole = json.loads((reports / "step_2" / "report.json").read_text())
    other = json.loads((work / "cut" / "report" / "report.json").read_text())
    assert whole["step"] == 2 and whole["average"]["num_questions"] == 21
    assert set(whole["average"]["pass_at"]["exact_match"]) == {"1", "2"}

    def greedy(folder):
        lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == "greedy"]

    assert greedy(reports / "step_2") == greedy(work / "cut" / "report"), "answers differ with the layout"
    for name in ("em", "em_format_gated", "f1", "tool_calls"):
        assert whole["average"][name] == other["average"][name]
    assert (reports / "step_2" / "report.md").read_text().count("| worldqa |") >= 2
    assert list((reports / "step_2" / "tensorboard").iterdir())


def test_the_export_comes_back_as_a_checkpoint_with_the_same_weights(work, trained, exported, monkeypatch):
    import convert
    from safetensors.torch import load_file

    monkeypatch.chdir(work)
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


def test_the_export_writes_in_transformers_what_chat_shows(path, exported):
    """chat.py plays the export with vLLM. Its first turn equals the text of transformers, token by token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    (command,) = (words for words in documented(SECTION) if script_of(words) == "tools/chat.py")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": command[-1]}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = tokenizer.decode(model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :])
    shown = re.search(r"^turn 1\n((?:    .*\n)+)", path.said["tools/chat.py"], flags=re.MULTILINE)[1]
    shown = "\n".join(line[4:] for line in shown.splitlines())
    assert len(shown) > 20 and written.startswith(shown)


@pytest.fixture(scope="module")
def agent(path, exported):
    """Address of the exported agent, which uses README's search server."""
    command = [sys.executable, "tools/serve.py", "--model", str(exported), "--port", "0"]
    server = subprocess.Popen(
        command, cwd=path.clone.folder, env=path.clone.environment, stdout=subprocess.PIPE, text=True
    )
    found = next((m for line in server.stdout if (m := re.search(r"listening on (http://\S+)", line))), None)
    assert found, f"the server ended with {server.wait()}"
    yield found[1]
    server.terminate()
    assert server.wait(timeout=60) == 0


def test_the_exported_agent_answers_over_http_what_chat_shows(path, agent):
    (command,) = (words for words in documented(SECTION) if script_of(words) == "tools/chat.py")
    body = {"model": "served", "messages": [{"role": "user", "content": command[-1]}]}
    url = f"{agent}/chat/completions"
    completion = httpx.post(url, json=body | {"temperature": 0}, timeout=120).json()
    (choice,) = completion["choices"]
    shown = re.search(r"^answer: (.*)$", path.said["tools/chat.py"], flags=re.MULTILINE)
    assert choice["message"] == {"role": "assistant", "content": shown[1] if shown else ""}
    turns = completion["agent"]["turns"]
    first_lines = [turn["text"].strip().splitlines()[0] for turn in turns]
    assert first_lines and all(line in path.said["tools/chat.py"] for line in first_lines)
    assert completion["usage"]["completion_tokens"] > 0
    assert httpx.get(f"{agent}/models").json()["data"][0]["id"] == "served"
    drawn = [httpx.post(url, json=body | {"seed": 7}, timeout=120).json()["agent"] for _ in range(2)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.3}, "temperature is 0.3; allowed: 0 or 1"),
        ({"stream": True}, "stream: "),
        ({"max_tokens": 5}, "max_tokens: "),
        ({"messages": [{"role": "system", "content": "x"}]}, "one message of role user"),
        ({"messages": [{"role": "user", "content": "la " * 900}]}, "tokens; allowed: at most 128"),
    ],
)
def test_what_the_agent_cannot_do_is_refused_in_one_line(agent, change, message):
    body = {"messages": [{"role": "user", "content": "who?"}]} | change
    answer = httpx.post(f"{agent}/chat/completions", json=body, timeout=120)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def operated(path, work, trained) -> dict[str, subprocess.CompletedProcess]:
    """The output of each command of docs/operate.md, run in order with the tiny model."""
    for name in ("raw", "data"):
        (work / name).mkdir()
    for name in ("train", "test"):
        shutil.copy(work / "artifacts" / "worldqa" / f"{name}.jsonl", work / "raw")
    for name in ("main", "second"):
        shutil.copytree(trained, work / "runs" / name)
    (work / "runs" / "retrieval.url").write_text(path.clone.address)
    shorter = {
        "tools/bench/retrieval.py": "--clients 2 --seconds 1",
        "tools/rollouts_to_demonstrations.py": "--any-answer --any-format",  # the tiny model does not yet answer well
    }
    done = {}
    for line in TYPED:
        scripts = [word for word in line.split() if word.endswith(".py")]
        done[line] = subprocess.run(
            ["bash", "-c", f"{line} {shorter.get(scripts[0], '') if scripts else ''}"],
            cwd=work,
            env=path.clone.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    return done


@pytest.mark.parametrize("line", TYPED)
def test_a_line_of_the_operators_page_can_be_typed(operated, line):
    assert operated[line].returncode == 0, operated[line].stdout[-2000:] + operated[line].stderr[-2000:]


def test_the_operators_page_leaves_what_it_says(operated, work):
    assert json.loads((work / "data" / "train.jsonl.report.json").read_text())["questions"] > 0
    (plan,) = (done.stdout for line, done in operated.items() if "tools/plan.py" in line)
    assert "fits in every phase" in plan and "too few" in plan
    (load,) = (done.stdout for line, done in operated.items() if "tools/bench/retrieval.py" in line)
    assert "wrong 0  lost 0" in load
    assert (work / "data" / "good.jsonl").read_text().count("\n") > 0
    assert (work / "rollouts.html").stat().st_size > 10_000


def test_a_cluster_command_in_the_operators_text_is_marked():
    for found in re.finditer(r"`(?:sbatch|scancel|scontrol|sinfo|squeue)(?: [^`]*)?`(.{0,10})", OPERATE):
        assert found[1].startswith(" (cluster)") or " " not in found[0].split("`")[1], found[0]


MISTAKES = {
    "checkpoint that is not there": (
        "tools/evaluate.py",
        ["--checkpoint", "none"],
        "--checkpoint: none does not exist",
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
        "TEST": str(work / "artifacts" / "worldqa" / "test.jsonl"),
        "STEP": str(trained / "checkpoints" / "step_2"),
    }
    filled = [re.sub("EXPORTED|TEST|STEP", lambda m: names[m.group()], argument) for argument in arguments]
    monkeypatch.chdir(work)
    # Run the tool in this process, in which an uncaught exception would be a traceback.
    tool = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [script, "--config", str(trained / "config.yaml"), *filled])
    monkeypatch.delenv("RANK", raising=False)
    assert tool.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (work / "new").exists()


@pytest.fixture(scope="module")
def own_task(path, work) -> Path:
    """Run the worked example of docs/customize.md, with its files next to the checkout."""
    page = (ROOT / "docs" / "customize.md").read_text(encoding="utf-8").split("## A task of your own")[1]
    *files, typed = re.findall(r"^```\w*\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    folder = work.parent / "my_task"
    folder.mkdir()
    for name, text in zip(
        ("questions.jsonl", "notes.py", "rewards.py", "loss.py", "task.yaml"), files, strict=True
    ):
        (folder / name).write_text(text)
    for words in commands(typed):
        path.clone(words)
    return folder


def test_a_task_of_the_users_own_files_trains_with_their_reward_tool_and_scores(own_task, work):
    records = [json.loads(line) for line in (work / "runs/my_task/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "reward/mean" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all(0 < record["reward/brief_mean"] <= 1 for record in steps)
    assert all(record["tools/open_sessions"] == 0 for record in steps)
    assert sum(record.get("tools/search_calls", 0) for record in steps) > 0
    assert any(record.get("turn_score/turn_1_mean", 0) != 0 for record in steps)
    assert all(0.5 < record["credit/mean_factor"] < 1 for record in steps)
    report = json.loads((work / "runs/my_task/evaluation/step_3/report.json").read_text())
    assert report["average"]["num_questions"] == 4


def test_a_changed_file_of_the_user_stops_the_next_start_in_one_line(own_task, path, work):
    rewards = own_task / "rewards.py"
    rewards.write_text(rewards.read_text().replace("0.25", "0.5"))
    command = ["launch/local.sh", "-n", "1", "configs/quickstart.yaml", "../my_task/task.yaml", "run.steps=4"]
    done = subprocess.run(
        command, cwd=work, env=path.clone.environment, capture_output=True, text=True, check=False
    )
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(errors) == 1 and "rewards.py" in errors[0]
