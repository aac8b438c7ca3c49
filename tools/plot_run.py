"""Plot a run's curves as one PNG, and print a summary of the run.

    python tools/plot_run.py RUN [--out FILE]

RUN is a run's folder (runs/NAME). The default of --out is RUN/curves.png.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from a2tgpo.config.expand import path_argument
from a2tgpo.io.atomic_file import atomic_file
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.program import exit_code
from a2tgpo.metrics.figure_style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    STAGE_COLORS,
    STYLE,
    smooth,
)
from a2tgpo.metrics.writer import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BETWEEN_STEPS = ("evaluation", "checkpoint")
"""Stages that run between steps and are not part of a step's time."""


class History:
    """A run's metrics as series over steps."""

    def __init__(self, records: Sequence[dict]):
        self._records = records

    @property
    def first_step(self) -> int:
        return self._records[0]["step"]

    @property
    def last_step(self) -> int:
        return self._records[-1]["step"]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps [n] at which the metric `name` has a finite value, and these values [n]. n may be 0."""
        points = [(r["step"], r[name]) for r in self._records if r.get(name) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)

    def numbered(self, pattern: str) -> dict[int, str]:
        """Return {number: name} for the metrics whose names match `pattern`. The pattern's group is the number."""
        names = {name for record in self._records for name in record}
        matches = [match for name in names if (match := re.fullmatch(pattern, name))]
        return {int(match.group(1)): match.string for match in sorted(matches, key=lambda m: int(m.group(1)))}

    def stages(self) -> dict[str, np.ndarray]:
        """Return {stage: seconds in each training step [num_steps]}, the stage with the largest sum first."""
        steps = [record for record in self._records if record.get("time/step_s") is not None]
        # Leave out `time/startup_*`, because it is not part of a step. Leave out `_min_s` and `_max_s`, the seconds
        # of the fastest and of the slowest rank.
        stage = r"time/(?!startup_)\w+(?<!_min)(?<!_max)_s"
        names = {name for record in steps for name in record if re.fullmatch(stage, name)}
        stages = {name[5:-2]: np.array([r.get(name) or 0.0 for r in steps]) for name in names}
        parts = {name: s for name, s in stages.items() if name not in ("step", *BETWEEN_STEPS)}
        return dict(sorted(parts.items(), key=lambda item: -item[1].sum()))


def draw_line(ax: Axes, history: History, name: str, label: str, color: object, *, marker: str = "") -> None:
    """Draw the series `name`. If the series is long, draw it faintly and draw its moving average over it."""
    steps, values = history.series(name)
    if not len(steps):
        return
    if marker or len(steps) < 12:
        ax.plot(steps, values, color=color, label=label, linewidth=2, marker=marker or ".", markersize=6)
        return
    ax.plot(steps, values, color=color, alpha=0.22, linewidth=1)
    ax.plot(steps, smooth(values), color=color, label=label, linewidth=2)


def draw_reward(ax: Axes, history: History) -> None:
    draw_line(ax, history, "reward/mean", "reward", BLUE)
    draw_line(ax, history, "reward/em", "exact match", ORANGE)


def draw_evaluation(ax: Axes, history: History) -> None:
    draw_line(ax, history, "evaluation/em", "EM", BLUE, marker="o")
    draw_line(ax, history, "evaluation/em_format_gated", "EM, format gated", ORANGE, marker="o")
    draw_line(ax, history, "evaluation/f1", "F1", GREEN, marker="o")
    ax.set_ylim(bottom=0)


def draw_hops(ax: Axes, history: History) -> None:
    rows = evaluation_rows(history)
    steps, _ = history.series("evaluation/em")
    places = np.arange(len(rows))
    columns = [(0.2, 2, f"step {steps[-1]:.0f}", BLUE)] if rows else []
    if len(steps) > 1:
        columns.insert(0, (-0.2, 1, f"step {steps[0]:.0f}", "#b9c4d0"))
    for offset, column, label, color in columns:
        bars = ax.bar(places + offset, [row[column] for row in rows], 0.38, label=label, color=color)
        ax.bar_label(bars, fmt="%.2f", fontsize=8, color=MUTED, padding=1)
    ax.set_xticks(places, [row[0] for row in rows])
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.25)  # room for the legend above the bars


def draw_gain(ax: Axes, history: History) -> None:
    draw_by_turn(ax, history, r"gain/turn_(\d+)_mean")
    ax.axhline(0, color=MUTED, linewidth=0.8, zorder=1)


def draw_clipping(ax: Axes, history: History) -> None:
    draw_line(ax, history, "clip/fraction", "all turns", INK)
    draw_by_turn(ax, history, r"clip/turn_(\d+)_fraction")
    ax.set_ylim(bottom=0)


def draw_by_turn(ax: Axes, history: History, pattern: str) -> None:
    """Draw one line per turn index. Later turns have darker lines."""
    from matplotlib import colormaps

    names = history.numbered(pattern)
    shades = colormaps["YlGnBu"](np.linspace(0.4, 0.95, max(len(names), 1)))
    for (turn, name), shade in zip(names.items(), shades, strict=False):
        draw_line(ax, history, name, f"turn {turn}", shade)


def draw_time(ax: Axes, history: History) -> None:
    stages = history.stages()
    steps, seconds = history.series("time/step_s")
    if not stages:
        return
    visible = [name for name, spent in stages.items() if spent.sum() >= 0.01 * seconds.sum()]
    shown = {name: stages[name] for name in visible[: len(STAGE_COLORS) - 1]}
    accounted = np.sum(list(shown.values()), axis=0) if shown else np.zeros_like(seconds)
    shown["other"] = np.maximum(seconds - accounted, 0.0)
    colors = [*STAGE_COLORS[: len(shown) - 1], STAGE_COLORS[-1]]
    ax.stackplot(steps, *shown.values(), labels=list(shown), colors=colors, linewidth=0)
    ax.set_ylim(0, 1.35 * seconds.max())  # room for the legend above the stack
    ax.legend(ncols=3, loc="upper left")


def draw_entropy(ax: Axes, history: History) -> None:
    draw_line(ax, history, "entropy/mean", "entropy", PURPLE)
    ax.set_ylim(bottom=0)


def draw_gradient(ax: Axes, history: History) -> None:
    draw_line(ax, history, "update/grad_norm", "gradient norm", RED)
    ax.set_ylim(bottom=0)


PANELS = (
    ("Reward while training", "", draw_reward),
    ("Held-out questions, greedy", "", draw_evaluation),
    ("Held-out EM by hops", "", draw_hops),
    ("Information gain by turn", "gain", draw_gain),
    ("Clip fraction", "share of tokens", draw_clipping),
    ("Time by stage", "seconds a step", draw_time),
    ("Policy entropy", "nats a token", draw_entropy),
    ("Gradient norm", "", draw_gradient),
)


def draw_run(history: History, title: str) -> Figure:
    """Draw all panels on one figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, 4, figsize=(18, 8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        )
        figure.suptitle(title, fontsize=15, fontweight="bold", x=0.01, ha="left")
        for ax, (name, unit, draw) in zip(axes.flat, PANELS, strict=True):
            ax.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK)
            ax.set_ylabel(unit)
            if draw is not draw_hops:
                ax.set_xlabel("step")
                ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            draw(ax, history)
            if draw is not draw_hops:
                ax.set_xlim(history.first_step, max(history.last_step, history.first_step + 1))
            if not ax.has_data():
                ax.text(0.5, 0.5, "not recorded", ha="center", color=MUTED, transform=ax.transAxes)
            elif len(ax.get_legend_handles_labels()[1]) > 1 and ax.get_legend() is None:
                ax.legend()
    return figure


def evaluation_rows(history: History) -> list[tuple[str, float, float]]:
    """Return rows (label, first EM, last EM): one row for all held-out questions, then one row per number of hops."""
    names = {"all": "evaluation/em"}
    names |= {
        f"{hops} hop{'s' * (hops > 1)}": name
        for hops, name in history.numbered(r"evaluation/em_(\d+)_hops").items()
    }
    return [(label, v[0], v[-1]) for label, name in names.items() if len(v := history.series(name)[1])]


def ends(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of the first fifth and the mean of the last fifth of a series, each of at least one value."""
    count = max(1, len(values) // 5)
    return float(values[:count].mean()), float(values[-count:].mean())


def summary(history: History) -> str:
    """Return the text of the summary: first and last EM by hops, gain by turn, and time by stage."""
    return "\n".join([*evaluation_lines(history), *gain_lines(history), *time_lines(history)])


def evaluation_lines(history: History) -> list[str]:
    """Return lines with the EM of the first and of the last evaluation: for all questions, then by hops."""
    lines = []
    steps, _ = history.series("evaluation/em")
    if len(steps):
        lines.append(f"held-out EM (greedy)      step {steps[0]:<6.0f} step {steps[-1]:<6.0f}  change")
        for label, before, after in evaluation_rows(history):
            lines.append(f"  {label:<22}  {before:>8.3f}    {after:>8.3f}  {after - before:>+8.3f}")
    return lines


def gain_lines(history: History) -> list[str]:
    """Return a line per turn index: mean gains early and late in the run, and the share of late gains that are
    positive."""
    lines = []
    gains = history.numbered(r"gain/turn_(\d+)_mean")
    if gains:
        lines.append("information gain by turn       early        late   positive")
        for turn, name in gains.items():
            _, means = history.series(name)
            _, positive = history.series(f"gain/turn_{turn}_positive")
            if len(means):
                early, late = ends(means)
                share = f"{ends(positive)[1]:>9.0%}" if len(positive) else "        –"
                lines.append(f"  turn {turn:<17}  {early:>+10.4f}  {late:>+10.4f}  {share}")
    return lines


def spread_columns(history: History, stage: str) -> str:
    """Return two columns for `stage`: the fastest rank's mean seconds per step, and the slowest rank's."""
    metric = "step" if stage == "whole step" else stage
    fastest, slowest = (history.series(f"time/{metric}_{end}_s")[1] for end in ("min", "max"))
    return f"   {fastest.mean():>12.2f}   {slowest.mean():>12.2f}" if len(fastest) else ""


def time_lines(history: History) -> list[str]:
    """Return a line per stage: mean seconds per step on rank 0, on the fastest rank and on the slowest rank."""
    lines = []
    steps = history.series("time/step_s")[1]
    stages = history.stages() | {"whole step": steps}
    if len(steps):
        header = f"{f'time by stage, {len(steps)} steps':<27}  {'mean s/step':>11}   {'share':>6}"
        has_spread = bool(len(history.series("time/step_max_s")[0]))
        lines.append(header + ("   fastest rank   slowest rank" if has_spread else ""))
        for name, spent in stages.items():
            line = f"  {name:<25}  {spent.mean():>11.2f}   {spent.sum() / steps.sum():>6.1%}"
            lines.append(line + (spread_columns(history, name) if has_spread else ""))
    for name in BETWEEN_STEPS:
        _, spent = history.series(f"time/{name}_s")
        if len(spent):
            lines.append(f"  {name + ', between steps':<25}  {spent.sum():>11.2f}   seconds in all")
    return lines


def plot() -> None:
    """Read the command line, draw the run's curves, and print its summary."""
    parser = argparse.ArgumentParser(description="Curves of a run as one PNG, and its closing summary.")
    parser.add_argument("run", type=path_argument, help="folder of the run, e.g. runs/quickstart")
    parser.add_argument("--out", type=path_argument, help="the picture; default: RUN/curves.png")
    options = parser.parse_args()
    out = options.out or options.run / "curves.png"
    records = read_metrics(options.run / METRICS_FILE)
    if not records:
        raise ConfigError(f"{options.run} has no {METRICS_FILE} with a step; give the folder of a run")
    history = History(records)
    figure = draw_run(history, f"{options.run.resolve().name}: {history.last_step} steps")
    with atomic_file(out) as stream:
        figure.savefig(stream, dpi=110, format="png")
    print(summary(history))
    print(f"curves: {out}")


if __name__ == "__main__":
    sys.exit(exit_code(plot))
