"""Decide when a run stops extrapolating its updates (GXPO's gate, in the form of the authors' later release)."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from a2tgpo.config.update import ExtrapolationConfig


class ExtrapolationGate:
    """Closes permanently when the gradients at the predicted points have grown.

    The observation of a step is the mean norm of the gradients at the predicted points of its updates. The first
    `warmup` observations are dropped. The next `window` observations fill the window. Each further observation h has

        z = (h - mean of the window) / (population standard deviation of the window + 1e-9).

    If z >= `tau` in `patience` consecutive observations, the gate closes. An observation with z >= `tau` does not
    enter the window. Any other observation replaces the oldest in the window. All ranks must observe the same norms.
    """

    def __init__(self, config: ExtrapolationConfig):
        self._config = config
        self._norms: deque[float] = deque(maxlen=config.window)
        self._num_dropped = 0
        self._num_high = 0

    @property
    def is_open(self) -> bool:
        return self._num_high < self._config.patience

    def observe(self, norm: float) -> float | None:
        """Process the observation of a step, and return its z.

        Return None if the window is not full yet, or if the gate is closed.
        """
        if not self.is_open:
            return None
        if self._num_dropped < self._config.warmup:
            self._num_dropped += 1
            return None
        if len(self._norms) < self._config.window:
            self._norms.append(norm)
            return None
        mean = math.fsum(self._norms) / len(self._norms)
        variance = math.fsum((known - mean) ** 2 for known in self._norms) / len(self._norms)
        z = (norm - mean) / (math.sqrt(variance) + 1e-9)
        if z >= self._config.tau:
            self._num_high += 1
        else:
            self._num_high = 0
            self._norms.append(norm)
        return z

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `load_state_dict` restores; it contains only values that JSON can represent."""
        return {"norms": list(self._norms), "num_dropped": self._num_dropped, "num_high": self._num_high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`. If the configured window is now shorter, keep only the newest norms."""
        self._norms = deque(state["norms"], maxlen=self._config.window)
        self._num_dropped, self._num_high = state["num_dropped"], state["num_high"]
