"""The held-out question sets of a run."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence

from a2tgpo.config.run import RunConfig
from a2tgpo.data.question_set import Question, load_questions
from a2tgpo.data.stratified_subset import stratified_subset
from a2tgpo.data.template import PromptSet
from a2tgpo.trajectory import Prompt


class EvaluationSets:
    """Held-out question sets that are played together. A position is a question's index over all sets.

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
        """A digest that is equal for equal sets. If there is only one set, the digest is the fingerprint of the
        set."""
        fingerprints = [of_set.fingerprint for of_set in self.sets.values()]
        if len(fingerprints) == 1:
            return fingerprints[0]
        named = "\n".join(f"{name} {value}" for name, value in zip(self._names, fingerprints, strict=True))
        return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()

    def name_of(self, position: int) -> str:
        """Return the name of the set that has the question at `position`."""
        return self._names[bisect.bisect_right(self._starts, position) - 1]

    def prompts(self, positions: Sequence[int]) -> list[Prompt]:
        """Return the prompts at the ascending `positions`. The index of each prompt is its position.

        If there are several sets, each id begins with the name of its set, because two sets may have equal ids.
        """
        found: list[Prompt] = []
        for (name, of_set), start in zip(self.sets.items(), self._starts, strict=False):
            places = range(len(of_set))
            mine = [position - start for position in positions if position - start in places]
            prefix = f"{name}/" if len(self.sets) > 1 else ""
            found += [
                dataclasses.replace(prompt, index=start + prompt.index, id=prefix + prompt.id)
                for prompt in of_set.prompts(places, mine)
            ]
        return found


def load_evaluation_sets(
    config: RunConfig, *, is_whole: bool = False, need_answers: bool = True
) -> dict[str, list[Question]]:
    """Return the questions of each held-out set of `config`, by the name of the set.

    Args:
        is_whole: whether to return all questions, and ignore the limits for evaluations during training.
        need_answers: whether a question without answers is an error.

    Raises:
        ConfigError: with a one-line message, if a file cannot be read.
    """
    found = {}
    for name, of_set in config.evaluation.files(config.data.test).items():
        key = f"evaluation.sets.{name}" if config.evaluation.sets else "data.test"
        questions = load_questions(of_set.file, key=key, need_answers=need_answers)
        limit = 0 if is_whole else of_set.max_questions
        found[name] = stratified_subset(questions, limit or len(questions))
    return found
