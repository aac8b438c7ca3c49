"""Compare runs: draw their curves in one picture, and write tables of their values and of settings that differ.

    python tools/compare_runs.py RUN RUN ... [--out FOLDER] [--metrics evaluation/em,reward/mean,...]
    python tools/compare_runs.py RUN RUN --exact

RUN is a run's folder (runs/NAME). The program writes curves.png and table.md to FOLDER, by default runs/comparison.
With --exact, the program writes no files. The exit code is then 1 if the numbers of two runs differ in any bit.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from a2tgpo.config.expand import path_argument
from a2tgpo.io.atomic_file import atomic_file, write_text
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.program import exit_code, program_parser
from a2tgpo.io.tables import markdown_table
from a2tgpo.io.terminal import end_with_reader
from a2tgpo.metrics.figure_style import STAGE_COLORS, STYLE
from a2tgpo.metrics.writer import METRICS_FILE, read_metrics
from a2tgpo.run.equality import differences as exact_differences

METRICS = (
    "evaluation/em",
    "reward/mean",
    "reward/format_error_rate",
    "turns/process_turns",
    "gain/turn_1_mean",
    "clip/fraction",
    "entropy/mean",
    "update/grad_norm",
    "time/step_s",
)
HIGHER_IS_BETTER = ("evaluation/", "reward/mean", "reward/em")

Series = dict[str, list[tuple[int, float]]]
"""{metric: [(step, value), ...]} of one run."""


def read_run(folder: Path) -> Series:
    """Return the finite values in a run's metrics file. Raise ConfigError if the file has none."""
    try:
        records = read_metrics(folder / METRICS_FILE)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from None
    if not records:
        raise ConfigError(f"{folder} has no {METRICS_FILE} with a step; give the folder of a run")
    series: Series = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and value is not None and math.isfinite(value):
                series.setdefault(name, []).append((record["step"], value))
    if not series:
        raise ConfigError(
            f"{folder}/{METRICS_FILE} has no finite value yet; give a run with at least one step"
        )
    return series


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Return a label per folder: its name, preceded by as many parent folders as are needed for different labels."""
    for depth in range(1, 10):
        labels = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    raise ConfigError("the same run is named twice; name each once")


def draw(runs: Mapping[str, Series], metrics: Sequence[str], out: Path) -> None:
    """Write the picture `out`: one panel per metric, with one curve per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4.6 * columns, 2.9 * rows), squeeze=False, layout="constrained"
        )
        for axis, metric in zip(axes.flat, metrics, strict=False):
            for number, (label, series) in enumerate(runs.items()):
                points = series.get(metric, [])
                # Choose the colour by the run's number, so that a run has the same colour in every panel.
                axis.plot(
                    [step for step, _ in points],
                    [value for _, value in points],
                    color=STAGE_COLORS[number % len(STAGE_COLORS)],
                    linestyle="-" if number < len(STAGE_COLORS) else "--",
                    marker="o" if len(points) < 12 else None,
                    markersize=3,
                    label=label,
                )
            axis.set_title(metric, fontsize=10, loc="left")
        for axis in axes.flat[len(metrics) :]:
            axis.set_visible(False)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)))
        with atomic_file(out) as stream:
            figure.savefig(stream, dpi=130, format="png")
        plt.close(figure)


def table(runs: Mapping[str, Series], metrics: Sequence[str]) -> str:
    """Return a Markdown table of each metric's last value, and of its best value if higher values are better."""
    lines = []
    for metric in metrics:
        lines.append([f"{metric}, last", *(_last(series.get(metric)) for series in runs.values())])
        if metric.startswith(HIGHER_IS_BETTER):
            lines.append([f"{metric}, best", *(_best(series.get(metric)) for series in runs.values())])
    return markdown_table(["metric", *runs], lines)


def _last(points: list[tuple[int, float]] | None) -> str:
    return f"{points[-1][1]:.4g} (step {points[-1][0]})" if points else "–"


def _best(points: list[tuple[int, float]] | None) -> str:
    if not points:
        return "–"
    step, value = max(points, key=lambda point: (point[1], -point[0]))
    return f"{value:.4g} (step {step})"


def differences(folders: Mapping[str, Path]) -> str:
    """Return a Markdown table of the settings that differ between runs, or "" if a run has no config.yaml."""
    configs: dict[str, dict[str, Any]] = {}
    for label, folder in folders.items():
        try:
            configs[label] = _flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError):
            return ""
    keys = sorted(set().union(*configs.values()))
    different = [key for key in keys if len({repr(config.get(key)) for config in configs.values()}) > 1]
    if not different:
        return "The runs have the same settings."
    lines = [[f"`{key}`", *(str(config.get(key, "–")) for config in configs.values())] for key in different]
    return markdown_table(["setting", *configs], lines)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix[:-1]: config}
    return {
        key: value for name, part in config.items() for key, value in _flat(part, f"{prefix}{name}.").items()
    }


def compare_exactly(folders: Sequence[Path]) -> int:
    """Print the values in which two runs differ. Return exit code 1 if they differ, else 0."""
    require(len(folders) == 2, "number of runs with --exact", len(folders), "2")
    found = exact_differences(*folders)
    print("\n".join(found) or "equal to the bit in all steps that both have recorded")
    return 1 if found else 0


def main() -> int:
    parser = program_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=path_argument, default=Path("runs/comparison"), metavar="FOLDER")
    parser.add_argument("--metrics", default=",".join(METRICS), help="names, separated by commas")
    parser.add_argument("--exact", action="store_true", help="are two runs equal to the bit?")
    args = parser.parse_args()
    return exit_code(lambda: compare_exactly(args.runs) if args.exact else compare(args))


def compare(args: argparse.Namespace) -> None:
    """Write curves.png and table.md to `args.out`, and print the table."""
    folders = dict(zip(run_labels(args.runs), args.runs, strict=True))
    runs = {label: read_run(folder) for label, folder in folders.items()}
    wanted = [name.strip() for name in args.metrics.split(",")]
    metrics = [name for name in wanted if any(name in series for series in runs.values())]
    known = sorted(set().union(*runs.values()))
    rule = f"a metric that a run has recorded, such as {', '.join(known[:8])}"
    require(bool(metrics), "--metrics", args.metrics, rule)
    text = f"{table(runs, metrics)}\n\n## Settings that differ\n\n{differences(folders)}"
    draw(runs, metrics, args.out / "curves.png")
    write_text(args.out / "table.md", f"# {', '.join(runs)}\n\n![Curves](curves.png)\n\n{text}\n")
    print(f"{text}\nwrote {args.out}/curves.png and table.md")


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
