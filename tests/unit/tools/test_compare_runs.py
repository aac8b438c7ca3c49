import json
import subprocess
from pathlib import Path

import pytest
from preloaded.command import PYTHON

from a2tgpo.record.rollout_files import part_path

ROOT = Path(__file__).parents[3]


def make_run(folder: Path, values, *, lr):
    folder.mkdir(parents=True)
    lines = [{"step": i, "reward/mean": v, "evaluation/em": v / 2, "x": None} for i, v in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(
        f"update: {{lr: {lr}, clip_grad: 1.0}}\nrun: {{name: {folder.name}}}\n"
    )
    return folder


def compare(*arguments):
    command = [PYTHON, "tools/compare_runs.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_curves_last_and_best_values_and_differing_settings(tmp_path):
    one = make_run(tmp_path / "a" / "run", [0.0, 0.8, 0.4], lr=1e-3)
    two = make_run(tmp_path / "b" / "run", [0.2, 0.4], lr=2e-3)
    done = compare(one, two, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| metric | a/run | b/run |" in page
    assert "| reward/mean, last | 0.4 (step 2) | 0.4 (step 1) |" in page
    assert "| evaluation/em, best | 0.4 (step 1) | 0.2 (step 1) |" in page
    assert "| `update.lr` | 0.001 | 0.002 |" in page and "clip_grad" not in page
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "none"], "none has no metrics.jsonl"),
        (["RUN", "RUN"], "the same run is named twice"),
        (["RUN", "DIVERGED"], "diverged/metrics.jsonl has no finite value"),
        (["RUN", "--metrics", "loss"], "--metrics is 'loss'"),
        (["RUN", "--out", "/proc/no"], "--out: cannot write /proc/no"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    run = make_run(tmp_path / "run", [0.1], lr=1)
    (tmp_path / "diverged").mkdir()
    (tmp_path / "diverged" / "metrics.jsonl").write_text('{"step": 1, "reward/mean": null}\n')
    places = {"RUN": run, "DIVERGED": tmp_path / "diverged"}
    done = compare(*[places.get(argument, argument) for argument in arguments])
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_exact_says_what_two_runs_computed_differently_and_ends_with_1(tmp_path):
    one = make_run(tmp_path / "one", [0.0, 0.8], lr=1)
    two = make_run(
        tmp_path / "two", [0.0, 0.8, 0.9], lr=2
    )  # one more step and other times are not differences
    lines = (two / "metrics.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"time/step_s": 3.0})
    (two / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for run, text in ((one, b"a"), (two, b"a")):
        part = part_path(run, 1, replica=0, num_replicas=1)
        part.parent.mkdir(parents=True)
        part.write_bytes(text)
        (run / "checkpoints" / "step_1").mkdir(parents=True)
        files = {"files": {"sharded/__0_0.distcp": [5, 1], "state.json": [len(str(run)), 2]}}
        marker = run / "checkpoints" / "step_1" / "complete.json"
        if run == one:  # run two has only kept this checkpoint's weights
            marker.write_text(json.dumps({"files": files["files"] | {"optimizer/__0_0.distcp": [7, 3]}}))
        else:
            marker.write_text(json.dumps(files | {"weights_only": True}))
    same = compare(one, two, "--exact")
    assert (same.returncode, same.stdout) == (0, "equal to the bit in all steps that both have recorded\n")

    (two / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1].replace("0.8", "0.8000000000000002") + "\n")
    part_path(two, 1, replica=0, num_replicas=1).write_bytes(b"b")
    files["files"]["sharded/__0_0.distcp"] = [5, 7]
    marker.write_text(json.dumps(files | {"weights_only": True}))
    other = compare(one, two, "--exact")
    assert other.returncode == 1
    assert other.stdout.splitlines() == [
        "step 1, reward/mean: 0.8 and 0.8000000000000002",
        "step 1: the rollouts differ",
        "step 1: the tensors of the checkpoints differ",
    ]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["one"], "number of runs with --exact is 1; allowed: 2"),
        (["one", "none"], "none has no metrics.jsonl"),
    ],
)
def test_a_mistake_with_exact_is_one_line(tmp_path, runs, message):
    make_run(tmp_path / "one", [0.1], lr=1)
    done = compare(*[tmp_path / run for run in runs], "--exact")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
