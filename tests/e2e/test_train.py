"""Whole programs, started as by a user: warm start, training, resume, other layouts."""

import gzip
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from documented import documented
from preloaded.command import PYTHON
from stub_judge import StubJudge, chat

from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.demonstrations import DemonstratedCall, Demonstration
from a2tgpo.data.question_set import parse_question
from a2tgpo.environment.tool import function_schema
from a2tgpo.environment.tools.search import Search
from a2tgpo.protocol.build import build_protocol
from a2tgpo.protocol.protocol import AgentProtocol
from a2tgpo.record.rollout_files import read_step, recorded_steps
from a2tgpo.run.equality import NOT_COMPARED
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.passage import format_passage
from a2tgpo.trajectory import Trajectory

from worlds.tiny_model import build_model, build_tokenizer, texts_of

ROOT = Path(__file__).parents[2]
CONFIG, CHAT_CONFIG = "configs/quickstart.yaml", "configs/quickstart_chat.yaml"
SMALL = [
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "update.prompts_per_minibatch=1",
    "evaluation.max_questions=6",
    "evaluation.every=0",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "rollout.gain.verify_every=1",
    "algorithm.entropy_coef=0.01",
    "algorithm.entropy_target=9",
]

pytestmark = pytest.mark.e2e


def start(*arguments: str, ranks: int = 2, script: str = "launch/train.py", timeout: int = 400):
    return launch("launch/local.sh", "-n", str(ranks), "--script", script, *arguments, timeout=timeout)


def launch(*command: str, timeout: int = 400):
    environment = os.environ | {"PYTHON": PYTHON, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rollouts_of(run: Path, step: int) -> list[dict]:
    return read_step(recorded_steps(run)[step])


def played_of(run: Path) -> list:
    """Return all tokens of the first step."""
    return [
        (record["prompt_id"], [(turn["tokens"], turn["observation_tokens"]) for turn in record["turns"]])
        for record in rollouts_of(run, 1)
    ]


@pytest.fixture(scope="module")
def warm_model(tmp_path_factory) -> str:
    """The quickstart's model after a warm start that is just long enough for some calls of the tool."""
    out = tmp_path_factory.mktemp("warm") / "model"
    settings = ["warmstart.steps=60", "warmstart.batch_size=24", f"model.path={out}"]
    root = tmp_path_factory.mktemp("runs")
    result = start(CONFIG, *settings, f"run.root={root}", script="launch/warmstart.py")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
    return str(out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, warm_model) -> Path:
    """A run of three steps without interruption on two data-parallel processes, which traces its last step."""
    root = tmp_path_factory.mktemp("whole")
    command = shlex.split(documented("profiling.md", "profile.steps="))
    settings = [f"model.path={warm_model}", f"run.root={root}", "run.deterministic=true"]
    result = launch(*command, *settings, *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "held-out EM" in result.stderr and "step 3/3" in result.stderr
    assert result.stderr.count("step 3: noise of the turn ratio over 3 steps: ") == 1
    return root / "profiled"


def test_a_run_leaves_its_metrics_rollouts_and_checkpoints(undisturbed):
    records = metrics_of(undisturbed)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert all(value is not None and math.isfinite(value) for r in records for value in r.values())
    for name in ("config.1.yaml", "env.1.txt", "tensorboard", "checkpoints/step_3/complete.json"):
        assert (undisturbed / name).exists(), name
    for record in records[1:]:
        assert record["gap/train_engine_abs_max"] < 1e-3, "trainer and engine disagree"
        assert 0 < record["gain/engine_trainer_gap_max"] < 1e-3, "they disagree on answers"
        assert record["ratio/noise_share"] >= 0
        assert record["update/skipped"] == 0 and record["update/grad_norm"] > 0
    # The entropy of each step is below the target, so the weight of the next step rises by entropy_delta.
    assert [record["entropy/weight"] for record in records[1:]] == pytest.approx([0.0, 1e-4, 2e-4])


def test_the_trainer_leaves_the_card_for_every_rollout_and_memory_does_not_creep(undisturbed):
    steps = metrics_of(undisturbed)[1:]
    for name in ("refit", "rollout", "score", "update"):
        (held,) = {record[f"memory/{name}_trainer_gib"] for record in steps[1:]}
        assert (held == 0) == (name == "rollout"), name
        first, last = (record[f"memory/{name}_used_gib"] for record in (steps[1], steps[-1]))
        assert last < 1.25 * first, (name, first, last)  # the memory of a save in progress comes and goes
    assert all(record["memory/moved_gib"] > 0 for record in steps)


def test_the_closing_summary_gives_each_stage_of_a_step_one_row(undisturbed):
    command = [PYTHON, "tools/plot_run.py", str(undisturbed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    lines = done.stdout.splitlines()
    (start,) = (n for n, line in enumerate(lines) if line.startswith("time by stage"))
    rows = [re.match(r"  (\S.*?)  +(\S.*)", line) for line in lines[start + 1 :]]
    values = {row[1]: row[2].split() for row in rows if row}
    stages = {"bank", "refit", "rollout", "exchange", "advantage", "score", "update", "whole step"}
    assert values.keys() == stages | {"evaluation, between steps", "checkpoint, between steps"}
    shares = [float(values[stage][1].rstrip("%")) for stage in stages - {"whole step"}]
    assert 50 < sum(shares) <= 101, "each share is rounded"
    for stage in stages:
        mean, _, fastest, slowest = values[stage]
        assert float(fastest) <= float(mean) <= float(slowest), stage


def test_the_trace_of_a_step_has_a_range_for_each_stage_around_its_operations(undisturbed):
    traces = sorted((undisturbed / "profile").rglob("*.*"))
    assert [str(path.relative_to(undisturbed)) for path in traces] == [
        f"profile/step_3/trace.rank_{rank}.json.gz" for rank in (0, 1)
    ]
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        spans: dict[str, list[tuple[float, float]]] = {}
        for event in events:
            if event.get("ph") == "X":
                spans.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
        stages = {name.removeprefix("stage: ") for name in spans if name.startswith("stage: ")}
        assert stages == {"bank", "refit", "rollout", "exchange", "advantage", "score", "update"}
        for inner, stage in (("gpu_model_runner: forward", "rollout"), ("autograd::engine", "update")):
            ((begin, end),) = spans[f"stage: {stage}"]
            inside = [
                begin <= first and last <= end
                for name, places in spans.items()
                if name.startswith(inner)
                for first, last in places
            ]
            assert sum(inside) > 1, (inner, stage)


def test_the_best_evaluation_is_named(undisturbed):
    scores, errors = (
        {r["step"]: r[f"evaluation/{name}"] for r in metrics_of(undisturbed) if "evaluation/em" in r}
        for name in ("em", "standard_error_em")
    )
    assert scores.keys() == {0, 3}
    assert errors[3] == pytest.approx(math.sqrt(scores[3] * (1 - scores[3]) / 6))
    step = 3 if scores[3] - scores[0] > math.hypot(errors[0], errors[3]) else 0
    best = json.loads((undisturbed / "checkpoints" / "best.json").read_text())
    assert best == {"step": step, "score": scores[step], "metric": "em", "standard_error": errors[step]}


def test_every_turn_group_of_two_or_more_has_finite_gains_that_are_not_all_zero(undisturbed):
    groups: dict[tuple, list[float]] = {}
    for step in (1, 2, 3):
        for record in rollouts_of(undisturbed, step):
            assert record["baseline_prob"] is not None
            turns = [turn for turn in record["turns"] if turn["query"] is not None]
            for index, turn in enumerate(turns):
                groups.setdefault((step, record["prompt_index"], index), []).append(turn["info_gain"])
    shared = [gains for gains in groups.values() if len(gains) >= 2]
    assert shared, "no question was searched for by two rollouts"
    for gains in shared:
        assert all(gain is not None and math.isfinite(gain) for gain in gains)
        assert any(gain != 0.0 for gain in gains)


def test_rollouts_hold_whole_groups_with_one_advantage_per_turn(undisturbed):
    records = rollouts_of(undisturbed, 1)
    assert {(r["prompt_index"], r["sample_index"]) for r in records} == {
        (p, s) for p in range(4) for s in range(4)
    }
    for record in records:
        for turn in record["turns"]:
            assert len(turn["tokens"]) == len(turn["rollout_logprobs"])
            assert math.isfinite(turn["advantage"]) and 0.7 <= turn["clip_scale"] <= 1.3
            assert math.isfinite(turn["ratio"])
            if record["prompt_index"] < 2:  # in the first mini-batch the policy is the policy that played
                assert turn["ratio"] == pytest.approx(1.0, abs=1e-4)


def test_two_deterministic_runs_are_equal_to_the_bit(tmp_path, warm_model, undisturbed):
    command = shlex.split(documented("reliability.md", "run.deterministic=true"))
    settings = [f"model.path={warm_model}", f"run.root={tmp_path}", "run.name=second", "run.steps=3"]
    result = launch(*command, *settings, *SMALL, "evaluation.at_start=false")
    assert result.returncode == 0, result.stderr[-3000:]
    runs = [undisturbed, tmp_path / "second"]
    command = [PYTHON, "tools/compare_runs.py", *map(str, runs), "--exact"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((run / "checkpoints/step_3").is_dir() and len(recorded_steps(run)) == 3 for run in runs)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory, warm_model):
    """Two steps, then steps 2 and 3 from the checkpoint of step 1, with damaged first weights and a judge."""
    root = tmp_path_factory.mktemp("replayed")
    model = shutil.copytree(warm_model, root / "model")
    server = StubJudge(lambda prompt, _: chat("correct" if len(prompt) % 2 else "incorrect"))
    judge = [
        "reward.names=[em, judge]",
        "reward.weights=[1, 0]",
        f"judge.url={server.url}",
        "judge.model=stub",
    ]
    # The learning rate is constant, so a shorter run takes the same first steps.
    common = [CONFIG, f"model.path={model}", f"run.root={root}", *SMALL, *judge, "run.deterministic=true"]
    first = start(*common, "run.steps=2")
    assert first.returncode == 0, first.stderr[-3000:]
    run, asked = root / "quickstart", Counter(prompts_of(server))
    steps, rollouts = metrics_of(run), rollouts_of(run, 2)
    weights = model / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as stream:
        stream.seek(header)
        stream.write(b"\xff" * (weights.stat().st_size - header))  # every weight is NaN
    second = start(*common, "run.steps=3", "--resume", str(run / "checkpoints/step_1"))
    server.close()
    assert second.returncode == 0, second.stderr[-3000:]
    assert "step 1 of 3" in second.stderr
    return SimpleNamespace(
        run=run, steps=steps, rollouts=rollouts, asked=asked, asked_in_all=Counter(prompts_of(server))
    )


def prompts_of(server: StubJudge) -> list[str]:
    return [request["messages"][0]["content"] for request in server.asked]


def test_a_run_resumed_from_a_step_goes_on_bit_for_bit_without_the_first_weights(replayed, undisturbed):
    def unjudged(record):
        return {k: v for k, v in record.items() if not k.startswith(NOT_COMPARED) and "judge" not in k}

    whole, resumed = metrics_of(undisturbed), metrics_of(replayed.run)
    assert [r["step"] for r in resumed] == [0, 1, 2, 3]
    for step in (2, 3):
        assert unjudged(resumed[step]) == unjudged(whole[step])
        records = rollouts_of(replayed.run, step)
        for record in records:
            record["rewards"].pop("judge")
        assert records == rollouts_of(undisturbed, step)


def test_a_run_resumed_from_a_step_asks_the_judge_nothing_twice(replayed):
    before, after = replayed.steps[2], metrics_of(replayed.run)[2]
    assert before["judge/calls"] > 0 and after["judge/calls"] == 0
    assert sum(replayed.asked.values()) >= sum(record.get("judge/calls", 0) for record in replayed.steps)
    assert after["judge/cache_hits"] == before["judge/cache_hits"] + before["judge/calls"]
    assert after["reward/judge_mean"] == before["reward/judge_mean"]
    assert rollouts_of(replayed.run, 2) == replayed.rollouts
    assert set(replayed.asked_in_all.values()) == {1}


def test_an_alarm_that_lasts_ends_the_run_and_a_restart_says_why_again(tmp_path, warm_model):
    settings = ["guard.max_train_engine_gap=1e-12", "guard.stop_after=2", "checkpoint.every=0", "run.steps=9"]
    arguments = [CONFIG, f"model.path={warm_model}", f"run.root={tmp_path}", *SMALL, *settings]
    run = tmp_path / "quickstart"
    for attempt in ("start", "restart"):
        result = start(*arguments)
        assert result.returncode == 3, (attempt, result.stderr[-3000:])
        lines = [line for line in result.stderr.splitlines() if line.startswith("stopped ")]
        assert len(lines) == 1 and "Traceback" not in result.stderr, (attempt, result.stderr[-3000:])
        for part in ("after step 3 of 9", "engine_gap", "best: the untrained model", "guard.stop_after=0"):
            assert part in lines[0]
        # The alarm about the gap starts at the second step past the limit.
        assert [r.get("alarm/engine_gap") for r in metrics_of(run)] == [None, 0, 1, 1]
        assert [p.name for p in (run / "checkpoints").glob("step_*")] == ["step_3"]
        assert ("step 2: alarm engine_gap: gap/train_engine_abs_mean" in result.stderr) == (
            attempt == "start"
        )


SHARED_ENGINE = (
    "parallel.tensor=2 rollout.tensor_parallel=2 rollout.kv_cache_gib=0.0025 rollout.max_concurrent=16"
)
"""Settings of one engine over both ranks, with a cache that is too small for all trajectories."""


@pytest.mark.parametrize("layout", [SHARED_ENGINE, "parallel.context=2", "parallel.pipeline=2"])
def test_other_layouts_take_the_same_first_step(tmp_path, warm_model, undisturbed, layout):
    settings = [f"model.path={warm_model}", f"run.root={tmp_path}", "run.steps=1", *SMALL, *layout.split()]
    if layout == "parallel.context=2":
        settings.append("rollout.gain.verify_every=0")  # the trainer's probes are not divided
    result = start(CONFIG, *settings, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    mine, theirs = played_of(tmp_path / "quickstart"), played_of(undisturbed)
    assert mine == theirs and len(mine) == 16
    mine, theirs = metrics_of(tmp_path / "quickstart")[1], metrics_of(undisturbed)[1]
    for name in ("reward/mean", "turns/process_turns", "length/response_tokens"):
        assert mine.get(name) == theirs.get(name), name
    for name in ("update/loss", "update/grad_norm", "entropy/mean", "advantage/max", "gain/turn_1_mean"):
        assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name


TWINS = {"Denmark": "Norway", "Austria": "Peru", "Japan": "Italy", "Spain": "Kenya"}
THOUGHT = "<think> I can answer now. </think>"
CAPITALS = dict(zip(TWINS, ("Copenhagen", "Vienna", "Tokyo", "Madrid"), strict=True))


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> Path:
    """A run of two steps in the chat protocol, on two ranks that share an engine, with partial rollouts.

    The model was taught to make two calls in its first turn, and then to answer.
    """
    folder = tmp_path_factory.mktemp("chat")
    questions = [
        {"id": one, "question": f"What is the capital of {one}, and of {two}?", "answers": [CAPITALS[one]]}
        for one, two in TWINS.items()
    ]
    asked = [question | {"id": f"{question['id']} {copy}"} for copy in range(3) for question in questions]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))
    config = load_config(ROOT / CHAT_CONFIG)
    protocol = taught_to_call_twice(folder / "model", questions, config)
    assert protocol.tools == ("search",)
    settings = [f"data.{name}={folder / 'questions.jsonl'}" for name in ("train", "test")]
    settings += [f"model.path={folder / 'model'}", f"run.root={folder}", "run.steps=2"]
    settings += ["parallel.tensor=2", "rollout.tensor_parallel=2", "algorithm.correction.kind=truncate"]
    settings += ["rollout.partial.tokens_per_step=20", "rollout.partial.extra_prompts=4"]
    result = start(CHAT_CONFIG, *SMALL, *settings, "evaluation.at_start=false", "checkpoint.every=0")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "quickstart_chat"


def taught_to_call_twice(out: Path, questions: list[dict], config: RunConfig) -> AgentProtocol:
    """Write a tiny model that knows the dialogues of the questions by heart, and return its protocol."""
    tokenizer = build_tokenizer(texts_of(ROOT / "artifacts/worldqa"), protocol="chat")
    index = Bm25Index(load_corpus(str(ROOT / config.search.corpus)))
    protocol = build_protocol(config, tokenizer, schemas=[function_schema("search", Search)], date=None)
    rows = []
    for number, question in enumerate(questions):
        queries = [f"capital of {land}" for land in (question["id"], TWINS[question["id"]])]
        answer = question["answers"][0]
        calls = tuple(
            DemonstratedCall(
                tool="search",
                arguments={"query": query},
                result=format_passage(1, index.search(query, 1)[0][0]),
            )
            for query in queries
        )
        shown = Demonstration(
            question=parse_question(question, "here", default_id="0"),
            turns=(("<think> First, the capital. </think>", None), (f"{THOUGHT} \\boxed{{{answer}}}", None)),
            calls=(calls, ()),
        )
        rows.append(protocol.demonstrate(shown, prompt_index=number))
    model = build_model(len(tokenizer), seed=0)
    teach(model, rows)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return protocol


def teach(model: torch.nn.Module, rows: list[Trajectory]) -> None:
    """Train on all tokens of `rows`, until the model writes them by heart."""
    longest = max(row.num_tokens for row in rows)
    tokens = torch.tensor([[*row.tokens, *[0] * (longest - row.num_tokens)] for row in rows])
    targets = torch.tensor([[*row.tokens, *[-100] * (longest - row.num_tokens)] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(30):
        logits = model(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2, loss.item()


def test_a_run_in_the_chat_protocol_trains_on_turns_with_two_calls_at_once(chat_run):
    steps = metrics_of(chat_run)
    assert [record["step"] for record in steps] == [1, 2]
    for record in steps:
        assert record["tools/calls_per_turn"] > 1.5 and record["update/grad_norm"] > 0
        assert 0 < record["gain/engine_trainer_gap_max"] < 1e-3, (
            "gains are scored elsewhere than in the trainer"
        )
    assert steps[0]["gap/train_engine_abs_max"] < 1e-3, "trainer and engine disagree"
    turns = [turn for step in (1, 2) for record in rollouts_of(chat_run, step) for turn in record["turns"]]
    twice = [turn for turn in turns if len(turn["calls"]) == 2]
    assert len(twice) > 16
    for turn in twice:
        assert turn["observation_text"].startswith("<|user|><tool_response>\n")
        assert turn["observation_text"].endswith("\n</tool_response><|end|><|assistant|>")
        assert turn["observation_text"].count("<tool_response>") == 2 and turn["text"].endswith("<|end|>")


def test_a_chat_trajectory_goes_on_in_the_next_step_after_its_calls(chat_run):
    steps, second = metrics_of(chat_run), rollouts_of(chat_run, 2)
    assert all(record["partial/carried_trajectories"] > 0 for record in steps)
    versions = [[turn["version"] for turn in record["turns"]] for record in second]
    carried = [record for record, of_turns in zip(second, versions, strict=True) if of_turns == [0, 1]]
    assert sum(len(record["turns"][0]["calls"]) == 2 for record in carried) > 4
    assert all(record["turns"][0]["info_gain"] is not None for record in carried)
