"""Write a comparison's results.csv, curves.csv and report.md, and TensorBoard curves that average the seeds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from contrast_figure import write_contrasts
from contrasts import area, areas, contrasts_text
from figures import write_figures
from seed_statistics import Estimate, estimate, paired_difference

from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.tables import markdown_table, write_csv
from a2tgpo.metrics.layout import TENSORBOARD_LAYOUT
from runs import RunResult, read_results

LAST_EVALUATIONS = 3
"""Methods are compared by their mean score in this many final evaluations."""
TRAINING_CURVES = (
    "reward/mean",
    "reward/em",
    "sampling/reward_all_mean",
    "entropy/mean",
    "turns/process_turns",
    "clip/fraction",
    "update/grad_norm",
)
"""Training metrics in curves.csv, which also has all held-out scores."""
HOPS_COLUMN = re.compile(r"em_(\d+)_hops")

Row = dict[str, str | int | float | None]


def write_report(out: Path, *, with_figures: bool = True) -> str:
    """Write all tables of the comparison in `out`, and return a line with the report's path.

    Args:
        with_figures: whether to also write the figures and TensorBoard's curves. They read the rollouts of all runs.

    Raises:
        ConfigError: if `out` is not the folder of a comparison.
    """
    plan, results = read_results(out)
    rows = [result_row(result) for result in results]
    finished = [result for result in results if result.is_finished]
    write_csv(out / "results.csv", rows)
    write_csv(out / "curves.csv", list(curve_rows(finished)))
    figures: dict[str, str] = {}
    if with_figures:
        figures = write_figures(finished, out)
        figures |= write_contrasts(plan.contrasts, areas(finished), out)
        write_boards(finished, out / "tensorboard")
    contrasts = contrasts_text(plan.contrasts, areas(finished)) if plan.contrasts else ""
    text = report_text(plan.methods, results, rows, contrasts) + figure_text(figures)
    write_text(out / "report.md", text)
    return f"{len(finished)} of {len(results)} runs finished; report: {out / 'report.md'}"


def result_row(result: RunResult) -> Row:
    """Return the run's row of results.csv. If the run is not finished, the row has no scores."""
    evaluations = result.evaluations() if result.is_finished else []
    trained = [record["evaluation/em"] for record in evaluations if record["step"] > 0]
    last = evaluations[-1] if evaluations else {}
    start = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else {}
    hops = sorted(name.partition("/")[2] for name in last if HOPS_COLUMN.fullmatch(name.partition("/")[2]))
    group_size = result.config.rollout.group_size if result.config else 0
    groups = played_groups(result)
    return {
        "method": result.run.method,
        "seed": result.run.seed,
        "status": result.status,
        "first_em": start.get("evaluation/em"),
        "final_em": last.get("evaluation/em"),
        "best_em": max(trained, default=None),
        "area_em": area(result) if evaluations else None,
        "last3_em": estimate(trained[-LAST_EVALUATIONS:]).mean if trained else None,
        **{name: last[f"evaluation/{name}"] for name in hops},
        "em_format_gated": last.get("evaluation/em_format_gated"),
        "f1": last.get("evaluation/f1"),
        "format_ok_rate": last.get("evaluation/format_ok_rate"),
        "tool_calls": last.get("evaluation/tool_calls"),
        "steps": result.steps,
        "groups": groups,
        "rollouts": groups * group_size,
        "tokens": int(total(result, "speed/sampled_tokens")),
        "seconds": total(result, "time/step_s", "time/evaluation_s", "time/checkpoint_s"),
    }


def played_groups(result: RunResult) -> int:
    """Return the number of groups that the run played in training, including groups that dynamic sampling dropped."""
    if result.config is None:
        return 0
    usual = result.config.rollout.prompts_per_step
    played = [record.get("sampling/groups_played") for record in result.records if record["step"] > 0]
    return sum(usual if groups is None else round(groups) for groups in played)


def total(result: RunResult, *metrics: str) -> float:
    return sum(record.get(name) or 0.0 for record in result.records for name in metrics)


def curve_rows(results: Sequence[RunResult]) -> Iterable[Row]:
    """Yield the rows of curves.csv. Each row has one value of one metric."""
    for result in results:
        for record in result.records:
            for name, value in record.items():
                if value is not None and (name in TRAINING_CURVES or name.startswith("evaluation/")):
                    yield {
                        "method": result.run.method,
                        "seed": result.run.seed,
                        "step": record["step"],
                        "metric": name,
                        "value": value,
                    }


def write_boards(results: Sequence[RunResult], folder: Path) -> None:
    """Write a TensorBoard run for each method, with every metric's mean over the seeds.

    A step has a mean only if the runs of all seeds recorded the metric at that step.
    """
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for method in dict.fromkeys(result.run.method for result in results):
        seeds = [{record["step"]: record for record in r.records} for r in results if r.run.method == method]
        board = SummaryWriter(str(folder / method))
        board.add_custom_scalars(TENSORBOARD_LAYOUT)
        for step, first in sorted(seeds[0].items()):
            for name in first:
                values = [records.get(step, {}).get(name) for records in seeds]
                if name != "step" and None not in values:
                    board.add_scalar(name, estimate([v for v in values if v is not None]).mean, step)
        board.close()


def report_text(
    methods: Sequence[str], results: Sequence[RunResult], rows: Sequence[Row], contrasts: str
) -> str:
    """Return the tables and texts of report.md. The caller adds the figures."""
    finished = [row for row in rows if row["status"] == "finished"]
    by_method = {method: [row for row in finished if row["method"] == method] for method in methods}
    by_method = {method: own for method, own in by_method.items() if own}
    parts = ["# Comparison of methods", setting_text(results)]
    if contrasts:
        parts += ["## Contrasts fixed before the runs", contrasts]
    if by_method:
        parts += ["## Held-out exact match", em_table(by_method, base=methods[0])]
        parts += ["## Last evaluation", last_table(by_method)]
        parts += ["## What it took", budget_table(by_method)]
    missing = [result for result in results if not result.is_finished]
    if missing:
        parts += ["## Not in the tables", "\n".join(fault_line(result) for result in missing)]
    return "\n\n".join(parts) + "\n"


def setting_text(results: Sequence[RunResult]) -> str:
    started = next((result for result in results if result.config is not None), None)
    if started is None or started.config is None:
        return "No run has started."
    config = started.config
    questions = [r["evaluation/num_questions"] for result in results for r in result.evaluations()]
    return (
        f"{config.model.path} on {config.data.train}, {config.run.steps} steps of "
        f"{config.rollout.prompts_per_step} prompts × {config.rollout.group_size} rollouts"
        + (f", evaluated greedily on {questions[-1]:.0f} held-out questions. " if questions else ". ")
        + "± is half of the 95 % interval of the mean over seeds (Student's t), ? for a single seed; it does "
        "not include the effect of another choice of questions. Runs with the same seed got the same questions "
        "in the same order; dynamic sampling used more of them."
    )


def em_table(by_method: Mapping[str, Sequence[Row]], *, base: str) -> str:
    """Return a table of each method's scores over training, and of its paired difference from the method `base`."""
    header = ["method", "seeds", "step 0", "last", "best", f"mean of last {LAST_EVALUATIONS}"]
    lines = []
    for method, rows in by_method.items():
        cells = [means(rows, name).text() for name in ("first_em", "final_em", "best_em", "last3_em")]
        difference = paired_difference(
            by_seed(rows, "last3_em"), by_seed(by_method.get(base, []), "last3_em")
        )
        lines.append([method, str(len(rows)), *cells, "" if method == base else difference_cell(difference)])
    note = (
        f"The difference is between the means of the last {LAST_EVALUATIONS} evaluations after step 0, seed by "
        "seed; bold if its interval excludes 0. The best of several evaluations selects lucky ones, so it is "
        "too high."
    )
    return markdown_table([*header, f"difference to {base}"], lines) + f"\n\n{note}"


def difference_cell(difference: Estimate) -> str:
    if not difference.count:
        return "–"
    text = f"{difference.text('+.3f')} (n = {difference.count})"
    return f"**{text}**" if difference.excludes_zero else text


def last_table(by_method: Mapping[str, Sequence[Row]]) -> str:
    names = {name for rows in by_method.values() for row in rows for name in row}
    hops = sorted((int(match.group(1)), name) for name in names if (match := HOPS_COLUMN.fullmatch(name)))
    columns = {f"EM, {number} hop{'s' * (number > 1)}": name for number, name in hops}
    columns |= {"EM, format gated": "em_format_gated", "F1": "f1"}
    columns |= {"format ok": "format_ok_rate", "tool calls": "tool_calls"}
    lines = [
        [method, *(means(rows, name).text() for name in columns.values())]
        for method, rows in by_method.items()
    ]
    return markdown_table(["method", *columns], lines)


def budget_table(by_method: Mapping[str, Sequence[Row]]) -> str:
    columns: dict[str, Callable[[Sequence[Row]], str]] = {
        "steps": lambda rows: f"{means(rows, 'steps').mean:.0f}",
        "groups played": lambda rows: f"{means(rows, 'groups').mean:,.0f}",
        "rollouts played": lambda rows: f"{means(rows, 'rollouts').mean:,.0f}",
        "sampled tokens": lambda rows: f"{means(rows, 'tokens').mean:,.0f}",
        "seconds": lambda rows: f"{means(rows, 'seconds').mean:,.0f}",
    }
    lines = [[method, *(cell(rows) for cell in columns.values())] for method, rows in by_method.items()]
    note = (
        "Means over a method's runs. Groups dropped by dynamic sampling count as played. Seconds are those of steps, "
        "evaluations and checkpoints, without start-up; runs played side by side slow each other down. "
        "Information gain is scored in every run, also if the method does not use it."
    )
    return markdown_table(["method", *columns], lines) + f"\n\n{note}"


def fault_line(result: RunResult) -> str:
    where = f" (logs/{result.run.log.name})" if result.run.log.exists() else ""
    return f"- {result.run.name} {result.status}: {result.fault}{where}"


def figure_text(figures: Mapping[str, str]) -> str:
    """Return Markdown that shows each picture above its caption. `figures` is {file name of the picture: caption}."""
    return "".join(f"\n![{Path(name).stem}]({name})\n\n{caption}\n" for name, caption in figures.items())


def by_seed(rows: Sequence[Row], column: str) -> dict[int, float]:
    return {int(row["seed"] or 0): float(row[column] or 0.0) for row in rows if row.get(column) is not None}


def means(rows: Sequence[Row], column: str) -> Estimate:
    return estimate(list(by_seed(rows, column).values()))
