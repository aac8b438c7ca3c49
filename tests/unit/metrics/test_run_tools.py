import json
import os
import subprocess
from pathlib import Path

import pytest
from preloaded.command import PYTHON

from a2tgpo.record.rollout_files import part_path, write_part
from a2tgpo.trajectory import Call, Trajectory, Turn

ROOT = Path(__file__).parents[3]


def run_tool(name, *arguments):
    done = subprocess.run(
        [PYTHON, str(ROOT / "tools" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout, done.stderr


def refusal(name, *arguments):
    code, out, err = run_tool(name, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def step_record(step):
    stages = {"time/rollout_s": 3.0, "time/update_s": 1.0, "time/refit_s": 0.01, "time/step_s": 5.0}
    gains = {"gain/turn_1_mean": 0.1 * step, "gain/turn_1_positive": 0.75, "clip/turn_1_fraction": 0.5}
    return {"step": step, "reward/mean": None, "entropy/mean": 1.0, **stages, **gains}


def evaluation_record(step, em):
    return {"step": step, "evaluation/em": em, "evaluation/em_1_hops": em, "evaluation/em_2_hops": em / 2}


@pytest.fixture
def run_dir(tmp_path):
    records = [evaluation_record(0, 0.25), *(step_record(step) for step in range(1, 11))]
    records[1] |= {"time/startup_imports_s": 30.0}  # not part of a step
    for record in records[1:]:
        record |= {"time/rollout_min_s": 2.0, "time/rollout_max_s": 4.0, "time/rollout_slowest_rank": 1.0}
        record |= {"time/step_min_s": 5.0, "time/step_max_s": 5.5, "time/step_slowest_rank": 0.0}
    records[-1] |= evaluation_record(10, 0.5) | {"time/evaluation_s": 7.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_summary_shows_exact_match_gain_and_time_and_leaves_a_picture(run_dir):
    code, out, err = run_tool("plot_run.py", run_dir)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["held-out", "EM", "(greedy)", "step", "0", "step", "10", "change"] in rows
    assert ["all", "0.250", "0.500", "+0.250"] in rows
    assert ["2", "hops", "0.125", "0.250", "+0.125"] in rows
    assert ["turn", "1", "+0.1500", "+0.9500", "75%"] in rows  # means of the first two and the last two steps
    header = [
        "time",
        "by",
        "stage,",
        "10",
        "steps",
        "mean",
        "s/step",
        "share",
        "fastest",
        "rank",
        "slowest",
        "rank",
    ]
    at = rows.index(header)
    assert rows[at + 1 : at + 5] == [
        ["rollout", "3.00", "60.0%", "2.00", "4.00"],
        ["update", "1.00", "20.0%"],  # none recorded its spread
        ["refit", "0.01", "0.2%"],
        ["whole", "step", "5.00", "100.0%", "5.00", "5.50"],
    ]
    assert ["evaluation,", "between", "steps", "7.00", "seconds", "in", "all"] in rows
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_run_of_one_step_without_evaluation_can_be_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.5}) + "\n")
    picture = tmp_path / "picture.png"
    code, _, err = run_tool("plot_run.py", tmp_path, "--out", picture)
    assert (code, err) == (0, "")
    assert picture.exists()


def test_folder_without_metrics_or_rollouts_is_refused_in_one_line(tmp_path):
    assert "has no metrics.jsonl" in refusal("plot_run.py", tmp_path)
    assert "has no rollouts" in refusal("view_rollouts.py", tmp_path)


def test_a_picture_goes_where_it_is_said_or_not_at_all(run_dir):
    assert "--out: cannot write" in refusal("plot_run.py", run_dir, "--out", run_dir)
    assert not run_dir.with_suffix(".png").exists()  # matplotlib appends .png to a name without ending


def rollout(sample, gain, *, prompt="q1"):
    turns = [
        Turn(
            tokens=[1, 2],
            rollout_logprobs=[0.0, 0.0],
            observation_tokens=[3],
            calls=[Call(tool="search", arguments="Peru")],
            info_gain=gain,
        ),
        Turn(tokens=[4], rollout_logprobs=[0.0]),
    ]
    record = Trajectory(
        prompt_index=0,
        prompt_id=prompt,
        sample_index=sample,
        prompt_tokens=[0],
        turns=turns,
        stop_reason="answer",
    ).to_dict()
    record["prompt_text"] = "Capital of Peru?"
    texts = [("<search> Peru </search>\x1b[2J", " <result>\nLima\n</result>"), (f"answer {sample}", "")]
    for turn, (text, observation) in zip(record["turns"], texts, strict=True):
        turn |= {"text": text, "observation_text": observation, "advantage": 0.5, "clip_scale": 1.1}
    return record


def test_rollouts_are_shown_in_the_order_asked_for(tmp_path):
    write_part([rollout(0, 0.1)], part_path(tmp_path, 9, replica=0, num_replicas=1))
    write_part([rollout(1, 0.3)], part_path(tmp_path, 10, replica=1, num_replicas=2))
    write_part([rollout(0, -0.2), rollout(2, None)], part_path(tmp_path, 10, replica=0, num_replicas=2))
    write_part([rollout(0, 0.1)], part_path(tmp_path, 11, replica=1, num_replicas=2))  # not complete
    code, out, err = run_tool("view_rollouts.py", tmp_path, "--order", "gain", "--limit", "2")
    assert (code, err) == (0, "")
    assert out.index("answer 1") < out.index("answer 2")
    assert "answer 0" not in out
    assert "step 10: 2 of 3 trajectories shown" in out
    assert "gain +0.3000" in out
    assert "query 'Peru', 1 tokens back" in out
    assert "    Lima" in out
    assert out.count("Capital of Peru?") == 1
    assert "\x1b" not in out  # no colours in a pipe, and no escape sequences of the model
    assert "recorded: 9 to 10" in refusal("view_rollouts.py", tmp_path, "--step", "3")
    assert "no rollouts of prompt 'q2'" in refusal("view_rollouts.py", tmp_path, "--prompt", "q2")


def test_damaged_rollout_file_is_one_line(tmp_path):
    path = part_path(tmp_path, 1, replica=0, num_replicas=1)
    write_part([rollout(0, 0.1)], path)
    path.write_bytes(path.read_bytes()[:20])
    assert "replica_0_of_1.jsonl.zst is damaged" in refusal("view_rollouts.py", tmp_path)
    fewer_logprobs = rollout(0, 0.1)
    fewer_logprobs["turns"][0]["rollout_logprobs"].pop()
    for record in ([1], {"prompt_id": "q1"}, rollout(0, 0.1) | {"turns": [1]}, fewer_logprobs):
        write_part([rollout(0, 0.1), record], path)
        assert "replica_0_of_1.jsonl.zst is damaged" in refusal("view_rollouts.py", tmp_path)


def test_a_rollout_whose_advantage_was_not_finite_can_be_read(tmp_path):
    record = rollout(0, 0.1)
    for turn in record["turns"]:
        turn |= {"advantage": None, "clip_scale": None, "ratio": None}  # to_record replaces nan by None
    write_part([record], part_path(tmp_path, 1, replica=0, num_replicas=1))
    code, out, err = run_tool("view_rollouts.py", tmp_path)
    assert (code, err) == (0, "") and out.count("no advantage") == 2
