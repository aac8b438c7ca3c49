"""Plot each method's advantage against the number of needless searches in a trajectory."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from style import MARKERS, SIGNAL_COLORS, decorate, finish, save
from turn_signals import MAX_NEEDLESS, MIN_SAMPLES, OUTCOMES, Columns, distributions

from a2tgpo.io.tables import write_csv
from a2tgpo.metrics.figure_style import MUTED, STYLE


def write_needless(columns: Columns, out: Path, origin: str) -> str:
    """Write needless.csv and needless.png from the columns of `needless_signals`. Return the figure's caption."""
    rows: list[dict] = []
    for outcome, reward in OUTCOMES.items():
        of_outcome = {
            name: values[columns["reward"] == reward] for name, values in columns.items() if name != "reward"
        }
        rows += [{"outcome": outcome, **row} for row in distributions(of_outcome, "needless")]
    write_csv(out / "needless.csv", rows)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(OUTCOMES), figsize=(12, 4.2), layout="constrained", sharey=True)
        for ax, outcome in zip(panels, OUTCOMES, strict=True):
            for number, name in enumerate(("IGPO", "A2TGPO", "GRPO")):
                own = [
                    row
                    for row in rows
                    if (row["outcome"], row["signal"]) == (outcome, name) and row["count"] >= MIN_SAMPLES
                ]
                ax.plot(
                    [row["needless"] for row in own],
                    [row["mean"] for row in own],
                    color=SIGNAL_COLORS[name],
                    marker=MARKERS[number],
                    linewidth=2,
                    label=name,
                )
            ax.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
            decorate(ax, outcome, "advantage", f"needless searches ({MAX_NEEDLESS}: or more)")
        finish(figure, panels[0], "Advantage of a rollout by searches beyond those its question needs")
    save(figure, out / "needless.png")
    return (
        "Needless searches: mean advantage of a rollout (over its sampled tokens) by outcome and by searches beyond "
        f"the number of hops, on {origin}; from {MIN_SAMPLES} rollouts on."
    )
