import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    command = [sys.executable, "tools/compare_runs.py", *map(str, arguments)]
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
        (["RUN", "DIVERGED"], "diverged/metrics.jsonl holds no finite number"),
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
