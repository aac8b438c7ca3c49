"""The weight of the entropy in the loss: constant, or adapted so that the entropy stays near a target.

The adaptation is the adaptive entropy control of Skywork-OR1 (arXiv 2505.22312). A level c starts at 0. After each
step, c rises by delta if the step's entropy is below the target, and falls by delta otherwise. The weight of the next
step is c if the entropy is below the target, and 0 otherwise. The paper uses the entropy of the current step. Here
the weight follows the entropy of the previous step, because a step of one mini-batch measures its entropy only in its
training pass.
"""

import math

from a2tgpo.config.algorithm import AlgorithmConfig


class EntropyWeight:
    """Weight of the entropy in the loss of the next step.

    All ranks must pass the same configuration and the same entropies.
    """

    def __init__(self, config: AlgorithmConfig):
        self._config = config
        self._level = 0.0
        self._is_below_target = False

    @property
    def value(self) -> float:
        """The weight. If it is 0, the loss has no entropy term."""
        if not self._config.entropy_target:
            return self._config.entropy_coef
        return self._level if self._is_below_target else 0.0

    def follow(self, entropy: float) -> None:
        """Adapt the weight to the mean entropy of a step, in nats per token. A NaN changes nothing."""
        if not self._config.entropy_target or math.isnan(entropy):
            return
        self._is_below_target = entropy < self._config.entropy_target
        delta = self._config.entropy_delta if self._is_below_target else -self._config.entropy_delta
        self._level = min(max(self._level + delta, 0.0), self._config.entropy_coef)

    def state_dict(self) -> dict:
        """Return the state that `load_state_dict` restores; it contains only values that JSON can represent."""
        return {"level": self._level, "is_below_target": self._is_below_target}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state`, with the level limited to the present `entropy_coef`."""
        self._level = min(state["level"], self._config.entropy_coef)
        self._is_below_target = state["is_below_target"]
