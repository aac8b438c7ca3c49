"""Which questions each step asks: seeded epochs, the same on every rank and in every layout."""

from collections.abc import Sequence

import numpy as np

from a2tgpo.config.check import ConfigError, require


class PromptSampler:
    """Deals question indices, `per_step` at a time, in a new seeded order each epoch.

    A step may span two epochs where `per_step` does not divide the number of questions, or may be dealt
    questions several times; none asks a question twice (those already in the step go to the end of the new
    epoch's order). Every rank holds the same sampler and takes its share of the step's list, so the order
    does not depend on how many ranks there are.

    Args:
        num_questions: size of the set.
        per_step: questions a step asks.
        seed: names the sequence of orders.
        fingerprint: of the questions, see `PromptSet.fingerprint`; empty: not known.

    Raises:
        ConfigError: if the set is smaller than one step.
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

    def next_indices(self, count: int | None = None, *, asked: Sequence[int] = ()) -> list[int]:
        """Indices of the next questions, all different: [count] in [0, num_questions).

        Args:
            count: None: `per_step`, a whole step.
            asked: what the step was dealt before; none of it is dealt again. With `count` it must not be more
                than the set. With partial rollouts what is carried over: see `PartialConfig.check_questions`.
        """
        count = self.per_step if count is None else count
        assert len(asked) + count <= self.num_questions, "a step cannot ask more than all questions"
        chosen = self._order[self._position : self._position + count]
        self._position += len(chosen)
        if len(chosen) < count:
            self.epoch += 1
            self._deferred = [*asked, *chosen]
            self._order = self._epoch_order()
            self._position = count - len(chosen)
            chosen = chosen + self._order[: self._position]
        return chosen

    def state_dict(self) -> dict:
        """What `load_state_dict` needs to go on from here; plain JSON values."""
        return {
            "num_questions": self.num_questions,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "deferred": list(self._deferred),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken; `per_step` may differ.

        Raises:
            ConfigError: if the question set or the seed is another one.
        """
        self.require_same_questions(state)
        self.epoch = state["epoch"]
        self._position = state["position"]
        self._deferred = list(state["deferred"])
        self._order = self._epoch_order()

    def require_same_questions(self, state: dict) -> None:
        """Raise `ConfigError`, one line, unless `state` was taken with these questions and this seed."""
        for key, name, mine in (
            ("num_questions", "the number of questions in data.train", self.num_questions),
            ("seed", "run.seed", self.seed),
        ):
            if state[key] != mine:
                raise ConfigError(
                    f"{name} is {mine}, the checkpoint was made with {state[key]}; "
                    "resume with the same data and seed, or start a new run"
                )
        # Checkpoints of earlier versions have none.
        saved = state.get("fingerprint") or self.fingerprint
        if saved != self.fingerprint:
            raise ConfigError(
                "data.train does not hold the questions that the checkpoint was made with: ids, texts or their order "
                "differ; resume with the same data, or start a new run (tools/convert.py exports the weights)"
            )

    def _epoch_order(self) -> list[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_questions).tolist()
        deferred = set(self._deferred)
        return [i for i in order if i not in deferred] + [i for i in order if i in deferred]
