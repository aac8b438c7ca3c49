"""Colours, matplotlib settings and smoothing that all figures share."""

from __future__ import annotations

from typing import Any

import numpy as np

INK, MUTED, GRID = "#1f2328", "#6e7781", "#e7e9ec"
BLUE, ORANGE, GREEN, PURPLE, RED = "#2a78d6", "#e8662d", "#159b6c", "#7a4fc9", "#d64550"
STAGE_COLORS = ["#2a78d6", "#e8662d", "#159b6c", "#e0a100", "#7a4fc9", "#d6689d", "#5b9aa0", "#8a8f98"]

STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def smooth(values: np.ndarray, weight: float = 0.85) -> np.ndarray:
    """Return the exponential moving average of `values`. Its first entries are not biased towards 0. [n] -> [n]."""
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        averages.append(total / norm)
    return np.array(averages)
