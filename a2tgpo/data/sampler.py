"""Choose the questions of each step, in a seeded order that is the same on every rank and in every layout."""

from collections.abc import Sequence

import numpy as np

from a2tgpo.io.errors import ConfigError, require


class PromptSampler:
    """Return question indices, `per_step` at a time, in an order that depends only on the seed and the epoch.

    A step may span several epochs. Questions that are already in the step then move to the end of the new epoch's
    order, so that no step contains a question twice.

    Args:
        per_step: number of questions that a step uses.
        seed: determines the orders of all epochs.
        fingerprint: value of `PromptSet.fingerprint`, or empty if it is unknown.

    Raises:
        ConfigError: if the set has fewer questions than one step uses.
    """

    def __init__(self, num_questions: int, per_step: int, seed: int, *, fingerprint: str = ""):
        require(
            per_step <= num_questions,
            "rollout.prompts_per_step",
            per_step,
            f"at most the number of questions in data.train ({num_questions})",
        )
        self.num_questions = num_questions
        self.per_step = per_step
        self.seed = seed
        self.fingerprint = fingerprint
        self.epoch = 0
        self._position = 0
        self._deferred: list[int] = []
        self._order = self._epoch_order()

    def next_indices(self, count: int | None = None, *, excluded: Sequence[int] = ()) -> list[int]:
        """Return the indices of the next questions, all different: [count] in [0, num_questions).

        Args:
            count: number of questions. None means `per_step`.
            excluded: indices that must not be returned, because their questions are in play already. Their number
                plus `count` is at most the size of the set.
        """
        count = self.per_step if count is None else count
        assert len(excluded) + count <= self.num_questions, (
            "a step cannot use more questions than data.train has"
        )
        chosen = self._order[self._position : self._position + count]
        self._position += len(chosen)
        if len(chosen) < count:
            self.epoch += 1
            self._deferred = [*excluded, *chosen]
            self._order = self._epoch_order()
            self._position = count - len(chosen)
            chosen = chosen + self._order[: self._position]
        return chosen

    def state_dict(self) -> dict:
        """Return the state for `load_state_dict`, as plain JSON values."""
        return {
            "num_questions": self.num_questions,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "deferred": list(self._deferred),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state`, which a sampler with another `per_step` may have saved.

        Raises:
            ConfigError: if the questions or the seed of `state` differ from this sampler's.
        """
        self.require_same_questions(state)
        self.epoch = state["epoch"]
        self._position = state["position"]
        self._deferred = list(state["deferred"])
        self._order = self._epoch_order()

    def require_same_questions(self, state: dict) -> None:
        """Raise a one-line `ConfigError` if the questions or the seed of `state` differ from this sampler's."""
        for key, name, mine in (
            ("num_questions", "the number of questions in data.train", self.num_questions),
            ("seed", "run.seed", self.seed),
        ):
            if state[key] != mine:
                raise ConfigError(
                    f"{name} is {mine}, but {state[key]} in the checkpoint; "
                    "resume with the same data and seed, or start a new run"
                )
        # Checkpoints of earlier versions have no fingerprint.
        saved = state.get("fingerprint") or self.fingerprint
        if saved != self.fingerprint:
            raise ConfigError(
                "data.train differs from the questions of the checkpoint (ids, texts or their order); resume "
                "with the same data, or start a new run (tools/convert.py exports the weights)"
            )

    def _epoch_order(self) -> list[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_questions).tolist()
        deferred = set(self._deferred)
        return [i for i in order if i not in deferred] + [i for i in order if i in deferred]
