"""1 if the package math-verify finds that the answer is mathematically equal to a gold answer, else 0.

The answer and the gold answers are LaTeX or plain expressions. For an expression such as 9^{9^{9^9}}, math-verify may
never end or may use up all memory. So helper processes (`reward/math_helper.py`) compare the answers. If a helper
takes too long, it is killed, and the answer is treated as wrong.
"""

from __future__ import annotations

import importlib.util
import threading

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.lifecycle.helper_process import HelperPool, HelperStartError, RequestFailedError
from a2tgpo.reward.episode import Episode, RewardError

NUM_HELPERS = 4
"""Largest number of helper processes of a rank."""


class MathEquality:
    needs_answers = True

    def __init__(self) -> None:
        self._helpers = HelperPool("a2tgpo.reward.math_helper", number=NUM_HELPERS)
        self._lock = threading.Lock()
        self._num_timeouts = 0

    def score(self, episode: Episode) -> float:
        if episode.answer is None:
            return 0.0
        try:
            return float(self._helpers.ask(episode.answer, episode.answers))
        except TimeoutError:
            with self._lock:
                self._num_timeouts += 1
            return 0.0
        except RequestFailedError:
            return 0.0
        except HelperStartError as error:
            raise RewardError(str(error)) from None

    def take_counts(self) -> dict[str, int]:
        """Return how many comparisons have taken too long since the last call."""
        with self._lock:
            number, self._num_timeouts = self._num_timeouts, 0
        return {"timeouts": number}

    def close(self) -> None:
        self._helpers.close()


def build(config: RunConfig) -> MathEquality:
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "reward.names has 'math', but the package math-verify is not installed; install it with "
            "pip install 'a2tgpo[math]'"
        )
    return MathEquality()
