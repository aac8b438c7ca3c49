"""Which evaluated policy of a run is the best so far, and the file that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from a2tgpo.checkpoint.folder import MARKER
from a2tgpo.io.atomic_file import write_text

BEST_FILE = "best.json"


@dataclass(frozen=True, kw_only=True)
class Best:
    """One evaluation."""

    step: int
    """Step of the checkpoint that has the weights; 0: the untrained weights at model.path, which are not saved again.
    """
    score: float
    metric: str
    standard_error: float = 0.0
    """Standard error of the score over the questions; 0 if a checkpoint of an earlier version did not store it."""


class BestCheckpoint:
    """The best held-out score among policies that still exist.

    A score is better only if it is higher by more than the standard error of the difference, sqrt(a^2 + b^2) for
    scores with standard errors a and b. Among policies that the questions cannot distinguish, the earliest therefore
    stays the best. (Both answer the same questions, so the true error of the difference is smaller.)

    `ROOT/best.json` names the best as {"step", "score", "metric", "standard_error"}. A resumed run takes its best
    from the checkpoint that it resumes, not from this file, and so forgets a best policy from dropped steps. The
    caller must also forget a best policy whose checkpoint no longer exists, because it was removed in favour of a
    checkpoint that is now dropped.

    Args:
        root: folder of the checkpoints.
        metric: `checkpoint.best_by`.
        is_writer: True on the one rank that writes the file.
    """

    def __init__(self, root: Path, metric: str, *, is_writer: bool):
        self._root = root
        self._metric = metric
        self._is_writer = is_writer
        self._best: Best | None = None

    @property
    def step(self) -> int | None:
        """Step of the best policy; None before the first evaluation."""
        return self._best.step if self._best else None

    def offer(self, step: int, scores: Mapping[str, float]) -> bool:
        """Compare an evaluation after `step` steps; return True if it is the best so far and its checkpoint must be
        saved.

        Step 0 needs no checkpoint: this method writes the file and returns False.

        Args:
            scores: as returned by `evaluate`.
        """
        if self._metric == "none":
            return False
        score, error = scores[self._metric], scores[f"standard_error_{self._metric}"]
        if not math.isfinite(score):
            return False
        if self._best and score - self._best.score <= math.hypot(error, self._best.standard_error):
            return False
        self._best = Best(step=step, score=score, metric=self._metric, standard_error=error)
        if step == 0:
            self.write()
        return step > 0

    def write(self) -> None:
        """Update the file; call this when the checkpoint of the best policy is complete."""
        if self._is_writer:
            write_best(self._root, self.state_dict())

    def describe(self) -> str:
        """Return the place of the best weights and their score, in a few words."""
        if self._best is None:
            return "none"
        place = self._root / f"step_{self._best.step}" if self._best.step else "the untrained model"
        return f"{place} ({self._best.metric} {self._best.score:.3f} ± {self._best.standard_error:.3f})"

    def state_dict(self) -> dict | None:
        """Return the state for `load_state_dict`, as plain JSON values."""
        return asdict(self._best) if self._best else None

    def load_state_dict(self, state: dict | None) -> None:
        """Continue with the best from `state`, unless it was chosen by another metric."""
        self._best = Best(**state) if state is not None and state["metric"] == self._metric else None

    def has_weights(self, step: int) -> bool:
        """Return whether this rank sees a complete checkpoint of `step`; step 0 needs none."""
        return step == 0 or (self._root / f"step_{step}" / MARKER).is_file()


def write_best(root: Path, best: dict | None) -> None:
    """Write `best`, a `BestCheckpoint.state_dict()`, to `root/best.json`; one rank calls this."""
    path = root / BEST_FILE
    if best is None:
        path.unlink(missing_ok=True)
        return
    write_text(path, json.dumps(best) + "\n")
