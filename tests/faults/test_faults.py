"""Real runs that are ended at points of a step. tests/fault_table.py runs more of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import rollouts_to_demonstrations
import yaml
from faults.chain import BROKEN, HANG_S, REQUEUED, WATCHED, Fault, run_chain, steps_needed
from faults.harness import ROOT, Row, metrics_of, start, write_inputs
from faults.single_runs import outage
from preloaded.command import PYTHON
from tiny_models import SCRIPTS, build_model, build_tokenizer

FAULTS = [
    Fault("kill", "rollout", 0, call=5),
    Fault("kill", "update", 1, call=2),
    Fault("kill", "save: written", 1),
    Fault("usr1", "rollout", 1, REQUEUED, call=5),
    Fault("term", "update", 0, REQUEUED),
    Fault("hang", "exchange", 1, BROKEN, overrides=WATCHED, within_s=HANG_S),
]

PARTIAL = [Fault("usr1", "rollout", 1, REQUEUED, call=5), Fault("kill", "after the bank", 0)]
"""Faults of a run with partial rollouts: in the middle of a rollout, and after a rollout that no checkpoint
covers.
"""

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of a run without faults, next to its configuration."""
    root = tmp_path_factory.mktemp("faults")
    done = start(write_inputs(root), "run.name=whole", f"run.steps={steps_needed(FAULTS)}")
    assert done.code == 0, done.output[-3000:]
    return root / "whole"


@pytest.fixture(scope="module")
def rows(whole) -> list[Row]:
    root, steps = whole.parent, steps_needed(FAULTS)
    config = root / "config.yaml"
    found = run_chain(config, "chain", FAULTS, whole, steps=steps, damage=True)
    for rank in (0, 1):  # stacks of the hang, which later starts keep
        stacks = (root / "chain" / "stacks" / f"rank_{rank}.txt").read_text()
        assert f"rank {rank} is in exchange" in stacks and "trainer.py" in stacks
    return found


def test_rollouts_that_are_carried_over_go_on_bit_for_bit_after_a_stop_and_a_kill(tmp_path):
    config = write_inputs(tmp_path)
    settings = yaml.safe_load(config.read_text())
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        2 * questions.read_text()
    )  # so many questions that no question in play is drawn again
    settings["rollout"]["partial"] = {"tokens_per_step": 1, "extra_prompts": 2, "max_staleness": 2}
    settings["algorithm"] = {"correction": {"kind": "truncate"}}
    settings["rollout"]["gain"] = {"verify_every": 1}
    config.write_text(yaml.safe_dump(settings))
    steps = steps_needed(PARTIAL)
    whole = start(config, "run.name=whole", f"run.steps={steps}")
    assert whole.code == 0, whole.output[-3000:]
    records = metrics_of(tmp_path / "whole")
    assert sum(record["partial/carried_trajectories"] for record in records.values()) > 0
    assert 1 <= max(record["partial/staleness_max"] for record in records.values()) <= 2
    assert all(record["gain/engine_trainer_gap_max"] < 1e-3 for record in records.values())
    for row in run_chain(config, "chain", PARTIAL, tmp_path / "whole", steps=steps):
        assert row.passed, row


def test_a_dead_search_server_pauses_the_rollout_and_a_signal_or_limit_ends_it_saved(tmp_path):
    for row in outage(write_inputs(tmp_path)):
        assert row.passed, row


@pytest.mark.parametrize("number", range(len(FAULTS) + 1))
def test_the_job_ends_with_one_message_and_the_next_start_goes_on_bit_for_bit(rows, number):
    assert rows[number].passed, rows[number]


def test_a_model_that_knows_nothing_learns_from_a_runs_good_rollouts_to_answer(whole, monkeypatch):
    """Rollouts become demonstrations for a warm start, and the engine evaluates the result. All programs are those
    that users start.
    """
    root, config = whole.parent, whole.parent / "config.yaml"
    good = root / "good.jsonl"
    monkeypatch.setattr("sys.argv", ["x.py", str(whole), "--out", str(good), "--per-question", "1"])
    assert rollouts_to_demonstrations.main() == 0
    asked = {json.loads(line)["question"] for line in good.read_text().splitlines()}
    assert len(asked) >= 4 and asked <= SCRIPTS.keys() - {"babble?", "loop?"}, "only what ended in an answer"
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(root / "cold")
    random_model = build_model(
        "qwen3", vocab_size=528, eos_token_id=tokenizer.eos_token_id, sharpness=1.0, seed=2
    )
    random_model.save_pretrained(root / "cold")
    settings = [
        "steps=120",
        "batch_size=4",
        "lr=8e-3",
        "weight_decay=0",
        "held_out=0",
        f"source={root / 'cold'}",
    ]
    warm_start = [
        *("launch/local.sh", "-n", "2", "--script", "launch/warmstart.py", str(config)),
        *(f"model.path={root / 'learned'}", f"warmstart.demonstrations={good}"),
        *(f"warmstart.{setting}" for setting in settings),
    ]
    variables = os.environ | {"PYTHON": PYTHON, "OMP_NUM_THREADS": "1"}
    subprocess.run(warm_start, cwd=ROOT, env=variables, timeout=300, check=True)
    evaluated = ["run.name=learned", "run.steps=1", "evaluation.at_start=true", "evaluation.max_questions=6"]
    done = start(config, f"model.path={root / 'learned'}", *evaluated, "evaluation.every=0")
    assert done.code == 0, done.output[-3000:]
    assert metrics_of(root / "learned")[0]["evaluation/em"] >= 0.5
