"""The colours, marks, titles and legends that all figures of a comparison share."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from a2tgpo.io.atomic_file import atomic_file
from a2tgpo.metrics.figure_style import INK, MUTED

# The palette of Okabe and Ito, which is safe for colour-blind readers. Grey replaces the palette's yellow.
PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8f98"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
MAX_METHODS = len(PALETTE)
SIGNAL_COLORS = {
    "raw": PALETTE[7],
    "IGPO": PALETTE[1],
    "A2TGPO": PALETTE[0],
    "sum": PALETTE[2],
    "rescaled": PALETTE[0],
    "GRPO": PALETTE[4],
}

DPI = 110


def decorate(ax: Axes, title: str, unit: str, across: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    ax.set_ylabel(unit)
    ax.set_xlabel(across)
    if across != "turn index":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if not ax.has_data():
        ax.text(0.5, 0.5, "not recorded", ha="center", color=MUTED, transform=ax.transAxes)


def finish(figure: Figure, labelled: Axes | None, title: str) -> None:
    """Add `title` to the figure. If `labelled` is a panel, also add a legend of its lines below all panels."""
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
    if labelled is not None:
        handles, labels = labelled.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=4)


def save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as stream:
        figure.savefig(stream, dpi=DPI, format="png")
    plt.close(figure)
