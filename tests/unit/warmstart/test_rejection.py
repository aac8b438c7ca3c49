"""Which rollouts become demonstrations, and which parts are kept."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import rollouts_to_demonstrations

from a2tgpo.data.demonstrations import load_demonstrations
from a2tgpo.data.question_set import Question
from a2tgpo.io.errors import ConfigError
from a2tgpo.record.rollout_files import part_path, write_part
from a2tgpo.warmstart.rejection import (
    Candidate,
    Filters,
    choose,
    demonstrations_of,
    read_rollouts,
    reject,
)

QUESTIONS = [Question(id=f"q{i}", question=f"who {i}?", answers=(f"a{i}",), hops=i) for i in range(3)]


def rollout(question: int = 0, sample: int = 0, *, calls: int = 1, tokens: int = 4, **changed) -> dict:
    call = {
        "tokens": [1] * tokens,
        "text": "<think> a </think> <search> b </search>\n",
        "observation_text": " <result>\nc\n</result>",
        "query": "b",
        "tool": "search",
        "tool_failed": False,
    }
    answer = call | {
        "text": f"<answer> {sample} </answer>",
        "query": None,
        "tool": None,
        "observation_text": "",
    }
    return {
        "prompt_id": f"q{question}",
        "sample_index": sample,
        "turns": [*[dict(call) for _ in range(calls)], answer],
        "stop_reason": "answer",
        "format_ok": True,
        "exact_match": 1.0,
        "outcome_reward": 1.0,
    } | changed


def write_run(run: Path, *steps: list[dict], replicas: int = 1) -> Path:
    """Write a run's folder with rollouts of steps 1, 2, ... from `replicas` replicas."""
    for step, records in enumerate(steps, 1):
        for replica in range(replicas):
            path = part_path(run, step, replica=replica, num_replicas=replicas)
            write_part(records[replica::replicas], path)
    return run


@pytest.mark.parametrize(
    ("record", "filters", "reason"),
    [
        (rollout(), Filters(), ""),
        (rollout(calls=0), Filters(), ""),
        (rollout(stop_reason="length"), Filters(), "without an answer"),
        (rollout(format_ok=False), Filters(), "broken format"),
        (rollout(format_ok=False), Filters(needs_format=False), ""),
        (rollout(exact_match=0.0), Filters(), "wrong answer"),
        (rollout(exact_match=0.0), Filters(needs_exact_match=False), ""),
        (rollout(outcome_reward=0.4), Filters(min_reward=0.5), "reward too low"),
        (rollout(tokens=4), Filters(max_tokens=7), "too long"),
        (rollout(tokens=4), Filters(max_tokens=8), ""),
    ],
)
def test_a_rollout_is_refused_by_the_first_filter_that_it_fails(record, filters, reason) -> None:
    assert reject(record, filters) == reason


def test_calls_that_failed_are_counted() -> None:
    record = rollout(calls=2)
    record["turns"][0]["tool_failed"] = True
    assert reject(record, Filters()) == "failed calls" and not reject(record, Filters(max_failed_calls=1))


def test_of_a_question_the_best_few_are_taken_and_no_text_twice() -> None:
    records = [
        (1, rollout(0, 0, calls=2)),
        (1, rollout(0, 1)),
        (2, rollout(0, 2, outcome_reward=1.5, calls=2)),
        (3, rollout(0, 1)),
        (3, rollout(1, 0)),
    ]
    counts: Counter[str] = Counter()
    found = choose(
        [Candidate(step=step, record=record) for step, record in records], per_question=2, counts=counts
    )
    assert [(item.step, item.record["prompt_id"], item.record["sample_index"]) for item in found] == [
        *((2, "q0", 2), (3, "q0", 1), (3, "q1", 0))
    ]
    assert counts == {"the same text as another": 1, "more than 2 of a question": 1}


def test_the_tool_prints_counts_and_writes_what_a_warm_start_reads(tmp_path, monkeypatch, capsys) -> None:
    steps = [[rollout(0, i) for i in range(3)] + [rollout(1, exact_match=0.0)], [rollout(2), rollout(1, 5)]]
    run = write_run(tmp_path / "run", *steps, replicas=2)
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"id": q.id, "question": q.question, "answers": q.answers, "hops": q.hops}) + "\n"
            for q in QUESTIONS
        )
    )
    (run / "config.yaml").write_text(f"data: {{train: {questions}}}\n")
    command = ["rollouts_to_demonstrations.py", str(run), "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    assert rollouts_to_demonstrations.main() == 0
    said = capsys.readouterr().out
    assert (
        "6 rollouts read, of steps 1" in said
        and "1 left out: wrong answer" in said
        and "1 left out: more than 2" in said
    )
    assert "4 taken, of 3 questions" in said
    found = load_demonstrations(str(out))
    questions_of = [dataclasses.replace(item.question, record="{}") for item in found]
    assert questions_of == [QUESTIONS[0], QUESTIONS[0], QUESTIONS[2], QUESTIONS[1]]
    call, answer = found[0].turns
    assert call == ("<think> a </think> <search> b </search>", " <result>\nc\n</result>")
    assert answer == ("<answer> 0 </answer>", None)
    monkeypatch.setattr("sys.argv", [*command, "--steps", "2"])
    assert rollouts_to_demonstrations.main() == 0
    assert "2 taken, of 2 questions" in capsys.readouterr().out


def test_rollouts_whose_calls_have_no_closing_tag_are_refused_in_one_line(tmp_path) -> None:
    played = rollout()
    played["turns"][0]["text"] = '{"name": "search"}<|eot_id|>'
    run = write_run(tmp_path, [played])
    with pytest.raises(ConfigError, match=r"'q0' has a rollout whose calls have no closing tag; only"):
        demonstrations_of(run, QUESTIONS, Filters(), per_question=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "7-9"], "has no rollouts of the requested steps; it has steps 1"),
        (["--steps", "x"], "--steps is 'x'; allowed"),
        (["--per-question", "0"], "--per-question is 0"),
        (["--max-tokens", "1"], "no rollout is good enough"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path, options, message, monkeypatch, capsys
) -> None:
    run, questions = write_run(tmp_path / "run", [rollout()]), tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"id": "q0", "question": "who 0?", "answers": ["a"]}) + "\n")
    command = ["x.py", str(run), "--out", str(tmp_path / "out"), "--questions", str(questions), *options]
    monkeypatch.setattr("sys.argv", command)
    assert rollouts_to_demonstrations.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not (tmp_path / "out").exists()


def test_a_damaged_file_and_questions_of_another_run_are_named(tmp_path) -> None:
    run = write_run(tmp_path / "run", [rollout(1)])
    with pytest.raises(ConfigError, match=r"question 'q1', which is not among the questions"):
        demonstrations_of(run, QUESTIONS[:1], Filters(), per_question=1)
    (path,) = (run / "rollouts" / "step_1").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"replica_0_of_1\.jsonl\.zst is damaged"):
        list(read_rollouts([path]))
