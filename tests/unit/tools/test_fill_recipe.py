"""The table of docs/recipes.md is filled by runs of the recipe only."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from fill_recipe import (
    AVERAGE,
    BEGIN,
    CONFIG,
    EMPTY,
    END,
    METHODS,
    QUESTIONS,
    ROWS,
    fill,
    read_table,
    to_table,
)
from preloaded.command import PYTHON

from a2tgpo.config.load import load_config
from a2tgpo.evaluate.evaluate import Answer
from a2tgpo.evaluate.report import summarize
from a2tgpo.io.errors import ConfigError
from a2tgpo.run.starts import record_start

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "recipes.md"
GRPO, A2TGPO = METHODS
PLACES = (
    *("run.seed=7", "data.train=elsewhere/train.parquet", "model.path=elsewhere/Qwen2.5-3B"),
    *(
        "search.url_file=",
        "search.url=http://n1:8000/retrieve",
        "parallel.tensor=2",
        "parallel.sequence=true",
    ),
    *("rollout.gpu_memory_fraction=0.7", "evaluation.every=50", "checkpoint.every=20"),
)


def answer(*, is_right: bool) -> Answer:
    return Answer(
        question_id="q",
        question="?",
        golds=("a",),
        hops=0,
        sample_index=0,
        answer="a",
        exact_match=float(is_right),
        f1=float(is_right),
        format_ok=False,
        tool_calls=1,
        stop_reason="stop",
    )


def make_run(folder: Path, *overrides: str, right: dict[str, int], steps: int = 500) -> Path:
    """Write the folder of a finished run: its starts, its metrics and the report of its last checkpoint."""
    config = load_config(CONFIG, overrides)
    folder.mkdir(parents=True)
    record_start(folder, config)
    lines = [{"step": step, "time/step_s": 90.0 + step % 3} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    yes, no = answer(is_right=True), answer(is_right=False)
    greedy = {name: [yes] * right[name] + [no] * (count - right[name]) for name, count in QUESTIONS.items()}
    report = folder / "evaluation" / f"step_{config.run.steps}" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps(summarize(greedy, {})))
    return folder


RIGHT = {name: count // 5 for name, count in QUESTIONS.items()} | {"bamboogle": 100}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "grpo", *PLACES, right=RIGHT)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    page = tmp_path / "recipes.md"
    page.write_text(f"before\n\n{BEGIN}\n\n{to_table({})}\n\n{END}\n\nafter\n")
    return page


def test_finished_runs_fill_the_columns_of_their_methods_one_after_the_other(run, page, tmp_path):
    fill([run], page)
    one = read_table(page.read_text())
    assert one[GRPO]["nq, EM"] == "0.200" and one[GRPO]["bamboogle, EM"] == "0.800"
    assert one[GRPO][AVERAGE] == "0.286"  # each set counts once, whatever its size
    assert one[GRPO]["seconds per step, median"] == "91.0" and one[GRPO]["seed"] == "7"
    assert one[GRPO]["seconds per step, planned"].endswith(" on 8 x h100-80gb")
    assert one[GRPO]["ranks and GPU"] != EMPTY and set(one[A2TGPO].values()) == {EMPTY}
    other = make_run(tmp_path / "a2tgpo", *METHODS[A2TGPO], right=QUESTIONS)
    fill([other], page)
    both = read_table(page.read_text())
    assert both[GRPO] == one[GRPO] and both[A2TGPO][AVERAGE] == "1.000"
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    with pytest.raises(ConfigError, match="one run of each method"):
        fill([run, run], page)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_size=8", r"Search-R1's GRPO\): rollout.group_size 5 -> 8;"),
        ("algorithm.kl_coef=0", r"algorithm.kl_coef 0.001 -> 0"),
        ("run.steps=600", "run.steps 500 -> 600"),
        ("model.path=models/Qwen2.5-3B-Instruct", "model.path 'Qwen2.5-3B' -> 'Qwen2.5-3B-Instruct'"),
        ("search.top_k=5", "search.top_k 3 -> 5"),
    ],
)
def test_a_run_with_another_setting_is_refused_by_its_key(run, page, override, message):
    record_start(run, load_config(CONFIG, [*PLACES, override]))
    before = page.read_text()
    with pytest.raises(ConfigError, match=message):
        fill([run], page)
    assert page.read_text() == before


def test_a_run_or_an_evaluation_that_is_not_whole_is_refused(run, page):
    report = run / "evaluation" / "step_500" / "report.json"
    whole = report.read_text()
    part = json.loads(whole)
    part["sets"]["popqa"]["num_questions"] = 100
    report.write_text(json.dumps(part))
    with pytest.raises(ConfigError, match=r"questions of popqa in .* is 100; allowed: 14267"):
        fill([run], page)
    del part["sets"]["nq"]
    report.write_text(json.dumps(part))
    with pytest.raises(ConfigError, match=r"questions of nq in .* is 0"):
        fill([run], page)
    report.unlink()
    with pytest.raises(ConfigError, match=r"no report .*; run tools/evaluate.py --config .*step_500"):
        fill([run], page)
    report.write_text(whole)
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:400]))
    with pytest.raises(ConfigError, match=r"last step in .* is 400; allowed: 500; finish the run first"):
        fill([run], page)


def test_a_mistake_ends_the_program_with_one_line_and_exit_code_2(run, tmp_path):
    (tmp_path / "other.md").write_text("no table\n")
    for arguments, message in (
        ([tmp_path], "has no readable config.yaml"),
        ([run, "--page", tmp_path / "other.md"], "has no table between"),
    ):
        command = [PYTHON, "tools/fill_recipe.py", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_page_has_the_rows_and_columns_that_the_program_writes():
    table = read_table(PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0])
    assert list(table) == list(METHODS) and all(tuple(column) == ROWS for column in table.values())
