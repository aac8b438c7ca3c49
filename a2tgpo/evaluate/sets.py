"""The held-out question sets of a run."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence

from a2tgpo.data.template import PromptSet
from a2tgpo.trajectory import Prompt


class EvaluationSets:
    """Held-out question sets that are played together. Positions count through the sets in their order.

    Args:
        sets: maps the name of each set to its questions.
    """

    def __init__(self, sets: Mapping[str, PromptSet]):
        self.sets = dict(sets)
        self._names = list(sets)
        self._starts = [0, *itertools.accumulate(map(len, sets.values()))]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def fingerprint(self) -> str:
        """A digest that is equal for equal sets. If there is only one set, this is the fingerprint of the set."""
        fingerprints = [of_set.fingerprint for of_set in self.sets.values()]
        if len(fingerprints) == 1:
            return fingerprints[0]
        named = "\n".join(f"{name} {value}" for name, value in zip(self._names, fingerprints, strict=True))
        return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()

    def name_of(self, position: int) -> str:
        """Return the name of the set that has the question at `position`."""
        return self._names[bisect.bisect_right(self._starts, position) - 1]

    def prompts(self, positions: Sequence[int]) -> list[Prompt]:
        """Return the prompts at `positions`, which ascend. The index of each prompt is its position."""
        found: list[Prompt] = []
        for of_set, start in zip(self.sets.values(), self._starts, strict=False):
            places = range(len(of_set))
            mine = [position - start for position in positions if position - start in places]
            found += [
                dataclasses.replace(prompt, index=start + prompt.index) for prompt in of_set.prompts(places, mine)
            ]
        return found
