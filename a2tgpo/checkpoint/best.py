"""Track the best policy that a run has evaluated so far, and write the file that names this policy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from a2tgpo.checkpoint.folder import MARKER
from a2tgpo.config.evaluation import SCORES
from a2tgpo.io.atomic_file import write_text

BEST_FILE = "best.json"


@dataclass(frozen=True, kw_only=True)
class Best:
    """The evaluation of the best policy so far."""

    step: int
    """Step of the checkpoint that has the weights. Step 0 means the untrained weights at model.path."""
    score: float
    metric: str
    standard_error: float = 0.0
    """Standard error of the score over the questions. 0 if an older checkpoint did not store the error."""


class BestCheckpoint:
    """The policy with the best held-out score among the evaluated policies whose weights still exist.

    A score is better only if it is higher by more than sqrt(a^2 + b^2), where a and b are the standard errors of the
    two scores. If the questions cannot distinguish several policies, the earliest of these policies stays the best.

    `ROOT/best.json` names the best policy as {"step", "score", "metric", "standard_error"}. A resumed run takes its
    best policy from the checkpoint that it resumes, not from this file. The caller must forget a best policy whose
    checkpoint no longer exists.

    Args:
        root: the folder of the run's checkpoints.
        metric: the value of `checkpoint.best_by`, which names the score to compare.
        is_writer: True on the one rank that writes the file.
    """

    def __init__(self, root: Path, metric: str, *, is_writer: bool):
        self._root = root
        self._metric = metric
        self._is_writer = is_writer
        self._best: Best | None = None

    @property
    def step(self) -> int | None:
        """The step of the best policy, or None before the first evaluation."""
        return self._best.step if self._best else None

    def offer(self, step: int, scores: Mapping[str, float]) -> bool:
        """Compare the evaluation after `step` steps with the best evaluation so far.

        Return whether to save a checkpoint now. If step 0 is the new best, this method writes `best.json` at once and
        returns False.

        Args:
            scores: the metrics that `evaluate` returned after `step` steps.
        """
        if self._metric == "none":
            return False
        of_set, slash, name = self._metric.rpartition("/")
        # A reward has no score if it could not judge any answer.
        score = scores.get(self._metric, math.nan)
        error = scores.get(f"{of_set}{slash}standard_error_{name}", math.nan)
        if not math.isfinite(score):
            return False
        if _is_of_reward(name) and scores.get(f"{of_set}{slash}num_unjudged", 0.0) > 0:
            return False  # a mean over some of the answers cannot be compared with a mean over all of them
        if self._best and score - self._best.score <= math.hypot(error, self._best.standard_error):
            return False
        self._best = Best(step=step, score=score, metric=self._metric, standard_error=error)
        if step == 0:
            self.write()
        return step > 0

    def write(self) -> None:
        """Write the best policy to the file. Call this when the checkpoint of the best policy is complete."""
        if self._is_writer:
            write_best(self._root, self.state_dict())

    def describe(self) -> str:
        """Return a short text with the place and the score of the best weights."""
        if self._best is None:
            return "none"
        place = self._root / f"step_{self._best.step}" if self._best.step else "the untrained model"
        return f"{place} ({self._best.metric} {self._best.score:.3f} ± {self._best.standard_error:.3f})"

    def state_dict(self) -> dict | None:
        """Return the best policy's record as JSON values for `load_state_dict`, or None before any evaluation."""
        return asdict(self._best) if self._best else None

    def load_state_dict(self, state: dict | None) -> None:
        """Restore the best policy of `state`, or none if `state` was written with another metric."""
        self._best = Best(**state) if state is not None and state["metric"] == self._metric else None

    def has_weights(self, step: int) -> bool:
        """Return whether this rank sees a complete checkpoint of `step`. Return True for 0, the untrained weights."""
        return step == 0 or (self._root / f"step_{step}" / MARKER).is_file()


def _is_of_reward(name: str) -> bool:
    """Return whether the score `name` of an evaluation is the mean of a reward."""
    return name not in SCORES and not name.startswith(("mean_at_", "pass_at_"))


def write_best(root: Path, best: dict | None) -> None:
    """Write `best` to `root/best.json`, or remove the file if `best` is None; one rank calls this.

    Args:
        best: the result of `BestCheckpoint.state_dict`.
    """
    path = root / BEST_FILE
    if best is None:
        path.unlink(missing_ok=True)
        return
    write_text(path, json.dumps(best) + "\n")
