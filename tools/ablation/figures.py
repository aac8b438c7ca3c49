"""Draw the figures of a comparison, and write each figure's numbers as CSV.

`learning_curves.png` shows held-out EM, training reward, entropy and turns over training (curves.csv).
`figure4.png` shows the gains and advantages of IGPO and A2TGPO by turn index, for the same trajectories.
`figure5.png` shows the spread of the advantage by the number of remaining process turns.
`figure10.png` shows the tool calls over training, and exact match by number of tool calls.
`needless.png` shows each method's advantages for trajectories with more searches than the question needs.

Figures 4, 5 and 10 correspond to the figures with these numbers in the paper (arXiv 2605.06200).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from needless import write_needless
from style import MARKERS, PALETTE, SIGNAL_COLORS, decorate, finish, save
from turn_signals import (
    MIN_SAMPLES,
    Columns,
    call_signals,
    distributions,
    drifts,
    envelope_signals,
    gain_signals,
    join,
    needless_signals,
    read_step,
    recorded_steps,
    spread_out,
)

from a2tgpo.io.tables import write_csv
from a2tgpo.metrics.figure_style import GRID, INK, MUTED, STYLE, smooth
from a2tgpo.trajectory import Trajectory
from runs import RunResult

ENVELOPE_LABELS = {
    "sum": "turn groups, plain sum",
    "rescaled": "turn groups, sum / √n (A2TGPO)",
    "IGPO": "pooled, plain sum (IGPO)",
}

SIGNAL_STEPS = 8
"""Number of steps per run from which figures 4 and 5 take trajectories."""
LAST_STEPS = 4
"""Number of final steps per run from which the right panel of figure 10 takes trajectories."""
SMOOTHED_FROM = 12
"""Smallest number of steps for which a learning curve is drawn as a moving average."""

LEARNING_PANELS: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("Held-out exact match, greedy", "", ("evaluation/em",)),
    # With dynamic sampling, reward/mean covers only the groups that were kept for training. Prefer the mean over all
    # played groups.
    ("Reward while training", "", ("sampling/reward_all_mean", "reward/mean")),
    ("Policy entropy", "nats a token", ("entropy/mean",)),
    ("Tool calls while training", "a rollout", ("turns/process_turns",)),
)
"""Panels as (title, unit, metrics). A panel draws the first of its metrics that a run has recorded."""


def write_figures(results: Sequence[RunResult], out: Path) -> dict[str, str]:
    """Draw every figure for which the finished runs `results` have data. Return {file name: caption}."""
    captions: dict[str, str] = {}
    if not results:
        return captions
    by_method: dict[str, list[RunResult]] = {}
    for result in results:
        by_method.setdefault(result.run.method, []).append(result)
    save(draw_learning_curves(by_method), out / "learning_curves.png")
    captions["learning_curves.png"] = (
        "Learning curves: means over seeds, shaded from the lowest to the highest seed; curves of "
        f"{SMOOTHED_FROM} values or more are moving averages."
    )
    source = signal_source(by_method)
    steps = sum(len(signal_steps(result)) for result in by_method[source])
    origin = f"rollouts of {source} (seeds: {len(by_method[source])}, steps: {steps})"
    gains = [gain_signals(rollouts) for rollouts in signal_batches(by_method[source])]
    if gains and len(join(gains)["turn"]):
        captions["figure4.png"] = write_figure4(join(gains), out, origin)
        envelopes = [envelope_signals(rollouts) for rollouts in signal_batches(by_method[source])]
        captions["figure5.png"] = write_figure5(join(envelopes), out, origin)
        needless = [needless_signals(rollouts) for rollouts in signal_batches(by_method[source])]
        if len(join(needless)["needless"]):  # no rows if the questions' hop counts are unknown
            captions["needless.png"] = write_needless(join(needless), out, origin)
    calls = {method: last_calls(own) for method, own in by_method.items()}
    captions["figure10.png"] = write_figure10(by_method, {m: c for m, c in calls.items() if c}, out)
    return captions


def signal_source(by_method: Mapping[str, Sequence[RunResult]]) -> str:
    """Return the last method with turn-group advantages, or the last of all methods if no method has them."""
    grouped = [
        method
        for method, own in by_method.items()
        if own[0].config is not None and own[0].config.algorithm.advantage == "turn_group"
    ]
    return [*by_method, *grouped][-1]


def signal_steps(result: RunResult) -> list[int]:
    return spread_out(list(recorded_steps(result.run.folder)), SIGNAL_STEPS)


def signal_batches(results: Sequence[RunResult]) -> list[list[Trajectory]]:
    """Return one list of trajectories per selected step. The steps are spread over the training of every run."""
    return [read_step(result.run.folder, step) for result in results for step in signal_steps(result)]


def last_calls(results: Sequence[RunResult]) -> Columns | None:
    """Return tool calls and exact match in the last steps of a method's runs, or None if nothing was recorded."""
    steps = [(r, step) for r in results for step in list(recorded_steps(r.run.folder))[-LAST_STEPS:]]
    parts = [call_signals(read_step(result.run.folder, step)) for result, step in steps]
    return join(parts) if parts else None


def draw_learning_curves(by_method: Mapping[str, Sequence[RunResult]]) -> Figure:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(12, 7.6), layout="constrained")
        for ax, (title, unit, names) in zip(axes.flat, LEARNING_PANELS, strict=True):
            draw_bands(ax, by_method, names)
            decorate(ax, title, unit, "step")
        finish(figure, axes.flat[0], f"Learning curves{seeds_text(by_method)}")
    return figure


def draw_bands(ax: Axes, by_method: Mapping[str, Sequence[RunResult]], names: Sequence[str]) -> None:
    """For each method, draw a line for the mean over seeds and a band for the range over seeds.

    The metric of a run is the first of `names` that the run has recorded.
    """
    for number, (method, results) in enumerate(by_method.items()):
        steps, values = seed_curves(results, names)
        if not len(steps):
            continue
        if len(steps) >= SMOOTHED_FROM:
            values = np.stack([smooth(own) for own in values])
        color = PALETTE[number]
        ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.13, linewidth=0)
        ax.plot(
            steps,
            values.mean(axis=0),
            color=color,
            label=method,
            linewidth=2,
            marker=MARKERS[number],
            markersize=5,
            markevery=max(1, len(steps) // 6),
        )


def seed_curves(results: Sequence[RunResult], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps [n] at which all runs have a value, and these values [runs, n].

    The metric of a run is the first of `names` that the run has recorded.
    """
    curves = []
    for result in results:
        found = [{r["step"]: r[name] for r in result.records if r.get(name) is not None} for name in names]
        curves.append(next((curve for curve in found if curve), {}))
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return np.array(steps, dtype=float), np.array([[curve[step] for step in steps] for curve in curves])


def write_figure4(columns: Columns, out: Path, origin: str) -> str:
    """Write figure4.csv, figure4_drift.csv and figure4.png. Return the caption."""
    rows = list(distributions(columns, "turn"))
    found = drifts(rows)
    write_csv(out / "figure4.csv", rows)
    write_csv(out / "figure4_drift.csv", found)
    by_signal = {row["signal"]: row for row in found}
    panels = ("raw gain", "IGPO gain", "A2TGPO gain", None, "IGPO advantage", "A2TGPO advantage")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(14, 7.6), layout="constrained")
        for ax, name in zip(axes.flat, panels, strict=True):
            if name is None:
                draw_counts(ax, [row for row in rows if row["signal"] == "raw gain"])
                decorate(ax, "Turns with a gain", "count", "turn index")
                continue
            draw_boxes(ax, [row for row in rows if row["signal"] == name], SIGNAL_COLORS[name.split()[0]])
            drift = by_signal[name]["drift"]
            shown = "unknown" if drift is None else f"{drift:.2f}"
            decorate(ax, f"{name}: drift {shown}", "", "turn index")
        for row_axes in (axes[0, 1:], axes[1, 1:]):  # readers compare these panels, so give them one scale
            limits = [ax.get_ylim() for ax in row_axes]
            for ax in row_axes:
                ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        finish(figure, None, "Gains and advantages by turn index, on the same rollouts")
    save(figure, out / "figure4.png")
    turns = by_signal["raw gain"]["turns"].replace(" ", ", ") or "none"
    return (
        f"Figure 4: signals of the process turns by turn index, on {origin}, {len(columns['turn']):,} turns. Boxes "
        "from the 25th to the 75th percentile, whiskers from the 5th to the 95th, means as dots. Drift is the "
        f"largest less the smallest mean over turn indices with at least {MIN_SAMPLES} turns: {turns}. "
        "An advantage's drift has the outcome's own in it: rollouts of more turns are right more or less often."
    )


def draw_boxes(ax: Axes, rows: Sequence[Mapping], color: str) -> None:
    """Draw a box and a dot (the mean) for each turn index. If an index has too few values, draw only a faint box."""
    for row in rows:
        is_enough = row["count"] >= MIN_SAMPLES
        box = {
            "med": row["p50"],
            "q1": row["p25"],
            "q3": row["p75"],
            "whislo": row["p5"],
            "whishi": row["p95"],
        }
        ax.bxp(
            [box],
            positions=[row["turn"]],
            widths=0.55,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": color, "alpha": 0.35 if is_enough else 0.1, "edgecolor": color},
            medianprops={"color": color, "linewidth": 1.5},
            whiskerprops={"color": color},
            capprops={"color": color},
        )
    counted = [row for row in rows if row["count"] >= MIN_SAMPLES]
    ax.plot(
        [row["turn"] for row in counted],
        [row["mean"] for row in counted],
        color=INK,
        marker="o",
        markersize=5,
        linewidth=1,
        linestyle=":",
        zorder=3,
    )
    ax.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    turns = [row["turn"] for row in rows]
    ax.set_xticks(turns, [str(turn) for turn in turns])


def draw_counts(ax: Axes, rows: Sequence[Mapping]) -> None:
    turns = [row["turn"] for row in rows]
    bars = ax.bar(turns, [row["count"] for row in rows], 0.55, color=GRID)
    ax.bar_label(bars, fmt="{:,.0f}", fontsize=8.5, color=MUTED, padding=1)
    ax.margins(y=0.1)  # room for the numbers above the bars
    ax.set_xticks(turns, [str(turn) for turn in turns])


def write_figure5(columns: Columns, out: Path, origin: str) -> str:
    """Write figure5.csv and figure5.png. Return the caption."""
    rows = list(distributions(columns, "remaining"))
    write_csv(out / "figure5.csv", rows)
    names = list(dict.fromkeys(row["signal"] for row in rows))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        for number, name in enumerate(names):
            own = [row for row in rows if row["signal"] == name and row["count"] >= MIN_SAMPLES]
            places = np.array([row["remaining"] for row in own])
            style = {
                "color": SIGNAL_COLORS[name],
                "marker": MARKERS[number],
                "linewidth": 2,
                "label": ENVELOPE_LABELS[name],
            }
            left.plot(places, [row["std"] for row in own], **style)
            aside = places + 0.16 * (number - 1)
            right.vlines(
                aside, [row["p5"] for row in own], [row["p95"] for row in own], style["color"], linewidth=3
            )
            right.plot(
                aside, [row["mean"] for row in own], style["marker"], color=style["color"], markersize=7
            )
        left.set_ylim(bottom=0)
        right.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
        decorate(left, "Standard deviation", "advantage", "process turns from this one on (0: final turn)")
        decorate(right, "5th to 95th percentile, and mean", "advantage", "process turns from this one on")
        finish(figure, left, "Spread of the advantage by turns still to come")
    save(figure, out / "figure5.png")
    return (
        f"Figure 5: spread of the advantage, outcome included, by the process turns it sums over, on {origin}; from "
        f"{MIN_SAMPLES} values on."
    )


def write_figure10(
    by_method: Mapping[str, Sequence[RunResult]], calls: Mapping[str, Columns], out: Path
) -> str:
    """Write figure10.csv, for the right panel, and figure10.png. Return the caption."""
    rows = [
        {
            "method": method,
            "tool_calls": row["tool_calls"],
            "count": row["count"],
            "share": row["count"] / len(columns["tool_calls"]),
            "em": row["mean"],
        }
        for method, columns in calls.items()
        for row in distributions(columns, "tool_calls")
    ]
    write_csv(out / "figure10.csv", rows)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        draw_bands(left, by_method, ("turns/process_turns",))
        for number, method in enumerate(by_method):
            own = [row for row in rows if row["method"] == method and row["count"] >= MIN_SAMPLES]
            right.plot(
                [row["tool_calls"] for row in own],
                [row["em"] for row in own],
                color=PALETTE[number],
                marker=MARKERS[number],
                linewidth=2,
            )
        right.set_ylim(-0.02, 1.02)
        decorate(left, "Tool calls while training", "a rollout", "step")
        decorate(
            right, f"Exact match by tool calls, last {LAST_STEPS} steps", "", "tool calls of the rollout"
        )
        finish(figure, left, f"Tool calls{seeds_text(by_method)}")
    save(figure, out / "figure10.png")
    return (
        f"Figure 10: tool calls over training, and exact match of the training rollouts of the last {LAST_STEPS} "
        f"steps by tool calls, from {MIN_SAMPLES} rollouts on. Questions that need more searches are harder; under "
        "dynamic sampling only the groups trained on are counted."
    )


def seeds_text(by_method: Mapping[str, Sequence[RunResult]]) -> str:
    """Return the end of a figure's title, which says how many seeds each line averages."""
    counts = sorted({len(own) for own in by_method.values()})
    if len(counts) > 1:
        return f", {counts[0]} to {counts[-1]} seeds"
    return f", {counts[0]} seed{'s' * (counts[0] > 1)}"
