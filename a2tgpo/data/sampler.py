"""Choose the questions of each step, in a seeded order that is the same on every rank and in every layout."""

from collections.abc import Sequence

import numpy as np

from a2tgpo.io.errors import ConfigError, require


class PromptSampler:
    """Returns question indices, `per_step` at a time. The seed and the number of the epoch determine the order of the
    questions.

    The questions of several sets may be mixed. Each set has epochs of its own. The next question always comes from
    the set that is furthest behind its share, so each set stays within one question of its share. If the step already
    has all questions of a set, the set waits for the next step.

    A step may span two epochs of a set. No step contains a question twice, because the questions that are already in
    the step move to the end of the new epoch's order. With partial rollouts, a question may be in flight when its
    turn comes. Its set then deals it later in the epoch, when it is no longer in flight. If it is in flight until the
    end of the epoch, this epoch leaves it out. Every rank has the same sampler and takes its share of the step's
    list, so the order does not depend on the number of ranks.

    Args:
        sizes: number of questions of each set. The questions of all sets are numbered consecutively, set by set.
        per_step: number of questions that a step uses.
        seed: determines the orders of all epochs.
        weights: share of each set in the questions of a step, in any unit; None: there is only one set.
        fingerprint: fingerprint of the questions, see `PromptSet.fingerprint`; empty if it is unknown.

    Raises:
        ConfigError: if the sets have fewer questions than one step uses.
    """

    def __init__(
        self,
        sizes: int | Sequence[int],
        per_step: int,
        seed: int,
        *,
        weights: Sequence[float] | None = None,
        fingerprint: str = "",
    ):
        sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        self.num_questions = sum(sizes)
        require(
            per_step <= self.num_questions,
            "rollout.prompts_per_step",
            per_step,
            f"at most the number of questions in data.train ({self.num_questions})",
        )
        self.per_step = per_step
        self.seed = seed
        self.fingerprint = fingerprint
        weights = weights or [1.0] * len(sizes)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        self._sets = [
            _EpochOrder(
                size, start=start, seed=[seed] if number == 0 else [seed, number], share=weight / sum(weights)
            )
            for number, (size, start, weight) in enumerate(zip(sizes, starts, weights, strict=True))
        ]

    @property
    def epoch(self) -> int:
        """Number of completed epochs of the first set."""
        return self._sets[0].epoch

    def next_indices(self, count: int | None = None, *, excluded: Sequence[int] = ()) -> list[int]:
        """Return the indices of the next questions, all different: [count] in [0, num_questions).

        Args:
            count: number of questions. The default is `per_step`.
            excluded: indices that are not returned, because their questions are already in the step or, with partial
                rollouts, are still in flight. Their number plus `count` must not exceed the number of questions.
        """
        count = self.per_step if count is None else count
        assert len(excluded) + count <= self.num_questions, (
            "a step cannot use more questions than data.train has"
        )
        taken = [[index for index in excluded if index in order] for order in self._sets]
        chosen = []
        for _ in range(count):
            number = self._next_set([len(indices) for indices in taken])
            index = self._sets[number].take(taken[number])
            taken[number].append(index)
            chosen.append(index)
        return chosen

    def state_dict(self) -> dict:
        """Return the state for `load_state_dict`, as plain JSON values."""
        first, *others = (order.state_dict() for order in self._sets)
        state = {
            "num_questions": self.num_questions,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            **first,
        }
        return state | ({"other_sets": others, "shares": self._shares} if others else {})

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state`, which a sampler with another `per_step` or other weights may have saved.

        If the weights have changed, the shares are measured from now on, without the questions returned before.

        Raises:
            ConfigError: if the questions or the seed of `state` differ from this sampler's.
        """
        self.require_same_questions(state)
        for order, saved in zip(self._sets, [state, *state.get("other_sets", ())], strict=True):
            order.load_state_dict(saved)
            if state.get("shares", self._shares) != self._shares:
                order.num_dealt = 0

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
        if saved != self.fingerprint or len(state.get("other_sets", ())) != len(self._sets) - 1:
            raise ConfigError(
                "data.train differs from the questions of the checkpoint (ids, texts or their order); resume "
                "with the same data, or start a new run (tools/convert.py exports the weights)"
            )

    @property
    def _shares(self) -> list[float]:
        return [order.share for order in self._sets]

    def _next_set(self, in_step: Sequence[int]) -> int:
        """Return the number of the set that is furthest behind its share and has questions that the step lacks.

        Args:
            in_step: number of questions of each set that the step already has.
        """
        dealt = sum(order.num_dealt for order in self._sets) + 1
        free = [number for number, order in enumerate(self._sets) if in_step[number] < order.size]
        return max(free, key=lambda number: (self._sets[number].behind(dealt), -number))


class _EpochOrder:
    """Deals the questions of one set, epoch by epoch.

    Args:
        size: number of questions in the set.
        start: index of the set's first question.
        seed: numbers that, together with the number of an epoch, seed the order of this epoch.
        share: this set's share of the sampler's questions.
    """

    def __init__(self, size: int, *, start: int, seed: Sequence[int], share: float):
        self.size = size
        self.epoch = 0
        self.num_dealt = 0
        self._start = start
        self._seed = list(seed)
        self.share = share
        self._position = 0
        self._deferred: list[int] = []
        self._passed: list[int] = []
        """Questions of this epoch that were in flight when their turn came, and that have not been dealt since."""
        self._order = self._epoch_order()

    def __contains__(self, index: int) -> bool:
        return self._start <= index < self._start + self.size

    def behind(self, num_dealt: int) -> float:
        """Return how many questions this set is behind its share of `num_dealt` questions."""
        return self.share * num_dealt - self.num_dealt

    def take(self, in_step: Sequence[int]) -> int:
        """Return the index of the next question.

        Args:
            in_step: the indices of this set that are in the step or in flight: fewer than the set has.
        """
        busy = set(in_step)
        self.num_dealt += 1
        for place, index in enumerate(self._passed):
            if index not in busy:
                return self._passed.pop(place)
        while True:
            if self._position == self.size:
                self.epoch += 1
                self._deferred, self._passed = list(in_step), []
                self._order = self._epoch_order()
                self._position = 0
            index = self._order[self._position]
            self._position += 1
            if index not in busy:
                return index
            self._passed.append(index)

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "position": self._position,
            "deferred": list(self._deferred),
            "passed": list(self._passed),
            "num_dealt": self.num_dealt,
        }

    def load_state_dict(self, state: dict) -> None:
        self.epoch = state["epoch"]
        self._position = state["position"]
        self._deferred = list(state["deferred"])
        self._passed = list(state.get("passed", ()))  # checkpoints of earlier versions lack this entry
        # Checkpoints of version 0.1 have no `num_dealt`, because that version had only one set.
        self.num_dealt = state.get("num_dealt", 0)
        self._order = self._epoch_order()

    def _epoch_order(self) -> list[int]:
        order = np.random.default_rng([*self._seed, self.epoch]).permutation(self.size) + self._start
        deferred = set(self._deferred)
        indices = order.tolist()
        return [i for i in indices if i not in deferred] + [i for i in indices if i in deferred]
