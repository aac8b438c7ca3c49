"""Draw the differences that a comparison tests, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from contrasts import contrast_differences
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from seed_statistics import estimate
from style import PALETTE, decorate, finish, save

from a2tgpo.metrics.figure_style import INK, MUTED, STYLE

FILE = "contrasts.png"
SPREAD = 0.28
"""Height of the band of points of one contrast, where neighbouring contrasts are 1 apart."""


def write_contrasts(
    contrasts: Sequence[str], scores: Mapping[str, Mapping[int, float]], out: Path
) -> dict[str, str]:
    """Draw contrasts.png: for each contrast "METHOD-BASE" a point per seed, the mean and its 95 % interval.

    Args:
        scores: {method: {seed: score}}.

    Returns:
        {file name: caption}. It is empty, and nothing is drawn, if no contrast has two seeds.
    """
    differences = {contrast: contrast_differences(contrast, scores) for contrast in contrasts}
    known = {contrast: values for contrast, values in differences.items() if len(values) > 1}
    if not known:
        return {}
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(9, 1.6 + 0.8 * len(known)), layout="constrained")
        for place, values in enumerate(known.values()):
            _draw(ax, place, values)
        ax.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
        decorate(ax, "", "", "difference of the mean held-out exact match over a run")
        ax.xaxis.set_major_locator(MaxNLocator(9))
        ax.set_yticks(range(len(known)), [contrast.replace("-", " - ") for contrast in known])
        ax.set_ylim(len(known) - 0.5, -0.5)
        finish(figure, None, "Contrasts")
    save(figure, out / FILE)
    return {
        FILE: "Contrasts: each point is the difference within one seed. The bar is the 95 % interval of the mean "
        "(Student's t), before the correction for the number of contrasts."
    }


def _draw(ax: Axes, place: int, values: Sequence[float]) -> None:
    mean = estimate(values)
    heights = place + np.linspace(-SPREAD, SPREAD, len(values))
    ax.plot(values, heights, "o", color=PALETTE[5], markersize=4.5, alpha=0.8, zorder=2)
    ax.errorbar(
        mean.mean,
        place,
        xerr=mean.half_width,
        color=INK,
        marker="D",
        markersize=6,
        capsize=5,
        linewidth=2,
        zorder=3,
    )
