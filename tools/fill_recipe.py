"""Write the results of finished runs of the recipe configs/search_r1_3b.yaml into the table of docs/recipes.md.

    python tools/fill_recipe.py RUN [RUN ...] [--page docs/recipes.md]

RUN is a run's folder (runs/NAME). Its last checkpoint must have been evaluated on all questions of the recipe's sets:

    python tools/evaluate.py --config RUN/config.yaml --checkpoint RUN/checkpoints/step_N

The results of a run replace the column of its method. If the settings or the numbers of questions differ from those
of the recipe, the program names the differences, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from a2tgpo.config.expand import path_argument
from a2tgpo.config.load import dump_config, flat_config, load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.program import exit_code, program_parser
from a2tgpo.io.tables import markdown_table
from a2tgpo.metrics.writer import METRICS_FILE, read_metrics
from a2tgpo.plan.dimensions import model_dimensions
from a2tgpo.plan.hardware import GPUS
from a2tgpo.plan.plan import make_plan
from a2tgpo.plan.workload import Workload
from a2tgpo.run.environment import parse_environment
from a2tgpo.run.rules import TRAINING, Changes, changes, describe_changes, written_settings
from a2tgpo.run.starts import CONFIG_FILE, number_of_starts

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "search_r1_3b.yaml"
METHODS = {
    "Search-R1's GRPO": (),
    "A²TGPO": (str(ROOT / "configs/algorithm/a2tgpo.yaml"), "algorithm.entropy_coef=0"),
}
"""For each column of the table, the overrides that follow the recipe's file."""
QUESTIONS = {
    "nq": 3610,
    "triviaqa": 11313,
    "popqa": 14267,
    "hotpotqa": 7405,
    "2wikimultihopqa": 12576,
    "musique": 2417,
    "bamboogle": 125,
}
"""Number of questions of each evaluation set in Search-R1's test.parquet."""
AVERAGE = "average of the seven sets"
PUBLISHED = "Search-R1's paper"
TARGETS = dict(
    zip((*QUESTIONS, AVERAGE), (0.421, 0.583, 0.413, 0.297, 0.274, 0.066, 0.128, 0.312), strict=True)
)
"""Published exact match of Search-R1 with GRPO on Qwen2.5-3B (base): arXiv 2503.09516v5, Table 3."""
EM = ", EM"
ROWS = (
    *(f"{name}{EM}" for name in QUESTIONS),
    AVERAGE,
    "seconds per step, median",
    "seconds per step, planned",
    "ranks and GPU",
    "seed",
    "date",
    "commit",
)
EMPTY = "not run yet"
BEGIN, END = "<!-- results, written by tools/fill_recipe.py -->", "<!-- end of the results -->"
FREE = (
    *("run.seed", "data.train", "data.test", "evaluation.", "parallel.", "model.recompute"),
    *("update.max_microbatch_tokens", "update.offload", "update.distributed_optimizer"),
    *("rollout.tensor_parallel", "rollout.check_lockstep_every", "rollout.max_concurrent"),
    *("rollout.kv_cache_gib", "rollout.gpu_memory_fraction", "rollout.block_size"),
    *("rollout.enforce_eager", "rollout.async_scheduling"),
)
"""Prefixes of settings in which a run of the recipe may differ: files, seed, evaluation, and layout. A run may
also differ in the settings that may change between two starts of one run, except run.steps."""

Column = dict[str, str]
"""{name of a row: text of the cell}."""


def fill(runs: Sequence[Path], page: Path) -> None:
    """Write the results of `runs` into the table of `page`, and print the table.

    Raises:
        ConfigError: with a one-line message, if a run does not follow the recipe, or if something is missing.
    """
    results = [read_result(run) for run in runs]
    methods = [method for method, _ in results]
    require(len(set(methods)) == len(methods), "RUN", ", ".join(methods), "one run of each method")
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"--page: cannot read {page}; name docs/recipes.md of a checkout") from None
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise ConfigError(f"--page: {page} has no table between {BEGIN} and {END}")
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    table = to_table({**read_table(old), **dict(results)})
    write_text(page, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
    print(f"{table}\nwrote {page}")


def to_table(columns: Mapping[str, Column]) -> str:
    """Return the table. A cell that no run has filled contains `EMPTY`."""
    rows = []
    for row in ROWS:
        target = TARGETS.get(row.removesuffix(EM))
        cells = [columns.get(method, {}).get(row, EMPTY) for method in METHODS]
        rows.append([row, "" if target is None else f"{target:.3f}", *cells])
    return markdown_table(["", PUBLISHED, *METHODS], rows)


def read_table(text: str) -> dict[str, Column]:
    """Return the columns of methods in a table that `to_table` wrote."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    if not cells:
        return {}
    return {
        method: {row[0]: row[number] for row in cells[2:]}
        for number, method in enumerate(cells[0])
        if method in METHODS
    }


def read_result(run: Path) -> tuple[str, Column]:
    """Return the method of a finished run, and the cells of its column.

    Raises:
        ConfigError: with a one-line message, if the run does not follow the recipe, or is not complete.
    """
    method = method_of(run)
    config = load_config(run / CONFIG_FILE)
    seconds = step_seconds(run, steps=config.run.steps)
    scores = set_scores(run / "evaluation" / f"step_{config.run.steps}" / "report.json", run)
    dimensions, _ = model_dimensions(config.model.path)
    gpu, gpus = GPUS[config.cluster.gpu], config.cluster.gpus
    planned = make_plan(config, dimensions, gpu, gpus=gpus, workload=Workload())
    first, last = environment(run, 1), environment(run, number_of_starts(run))
    commit, _, note = last.get("commit", "unknown").partition(" ")
    values = (
        *(f"{scores[name]:.3f}" for name in QUESTIONS),
        f"{statistics.fmean(scores.values()):.3f}",
        f"{seconds:.1f}",
        f"{planned.step_seconds:.1f} on {gpus} x {config.cluster.gpu}",
        last.get("gpu", "unknown"),
        str(config.run.seed),
        first.get("date", "unknown")[:10],
        f"{commit[:10]} {note}".strip(),
    )
    return method, dict(zip(ROWS, values, strict=True))


def method_of(run: Path) -> str:
    """Return the method whose settings the run has.

    Raises:
        ConfigError: if the run's settings fit none of `METHODS`. The message names the settings that differ.
    """
    try:
        text = (run / CONFIG_FILE).read_text(encoding="utf-8")
        found = {
            name: differences(text, load_config(CONFIG, [*overrides])) for name, overrides in METHODS.items()
        }
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        raise ConfigError(f"{run} has no readable {CONFIG_FILE}; give the folder of a run") from None
    method = min(found, key=lambda name: len(found[name]))
    if found[method]:
        raise ConfigError(
            f"{run} does not follow the recipe ({method}): {describe_changes(found[method])}; run the commands of "
            "docs/recipes.md"
        )
    return method


def differences(text: str, recipe: RunConfig) -> Changes:
    """Return {setting: (value in `recipe`, value in `text`)} where a run's configuration `text` differs."""
    keys = [key for key in flat_config(recipe) if is_compared(key, recipe)]
    wanted, has = written_settings(dump_config(recipe), keys), written_settings(text, keys)
    for settings in (wanted, has):
        settings["model.path"] = Path(str(settings.get("model.path", ""))).name
    return changes(wanted, has)


def is_compared(key: str, recipe: RunConfig) -> bool:
    if key == "run.steps":
        return True
    return TRAINING.is_used(key) and not TRAINING.is_free(key, recipe) and not key.startswith(FREE)


def step_seconds(run: Path, *, steps: int) -> float:
    """Return the median time of a step, in seconds. Raise ConfigError if the run has not recorded all its steps."""
    try:
        records = read_metrics(run / METRICS_FILE)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from None
    last = max((record["step"] for record in records), default=0)
    require(last >= steps, f"last step in {run / METRICS_FILE}", last, f"{steps}; finish the run first")
    times = [value for record in records if (value := record.get("time/step_s")) is not None]
    require(bool(times), f"time/step_s in {run / METRICS_FILE}", None, "a number in each step")
    return statistics.median(times)


def set_scores(report: Path, run: Path) -> dict[str, float]:
    """Return the exact match of each set in the report, without the format gate.

    Raises:
        ConfigError: if there is no report, or if the report does not cover all questions of the recipe's sets.
    """
    checkpoint = run / "checkpoints" / report.parent.name
    command = f"tools/evaluate.py --config {run / CONFIG_FILE} --checkpoint {checkpoint}"
    try:
        sets: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))["sets"]
        counts = {name: int(scores["num_questions"]) for name, scores in sets.items()}
        scores = {name: float(sets[name]["em"]) for name in sets}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{report}: no report of an evaluation; run {command}") from None
    for name, wanted in QUESTIONS.items():
        require(
            counts.get(name, 0) == wanted,
            f"questions of {name} in {report}",
            counts.get(name, 0),
            str(wanted),
        )
    return {name: scores[name] for name in QUESTIONS}


def environment(run: Path, number: int) -> dict[str, str]:
    try:
        return parse_environment((run / f"env.{number}.txt").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def main() -> int:
    parser = program_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="folders of finished runs")
    parser.add_argument(
        "--page", type=path_argument, default=ROOT / "docs" / "recipes.md", help="page with the table"
    )
    args: argparse.Namespace = parser.parse_args()
    return exit_code(lambda: fill(args.runs, args.page))


if __name__ == "__main__":
    sys.exit(main())
