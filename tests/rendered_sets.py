"""Evaluation sets of prompts that a test has rendered itself."""

import dataclasses
from collections.abc import Sequence

from a2tgpo.evaluate.sets import EvaluationSets
from a2tgpo.trajectory import Prompt


class Rendered:
    """A replacement of `PromptSet` for questions whose prompts already exist."""

    def __init__(self, prompts: Sequence[Prompt]):
        self.members = prompts
        self.fingerprint = " ".join(prompt.id for prompt in prompts)

    def __len__(self) -> int:
        return len(self.members)

    def prompts(self, indices: Sequence[int], positions: Sequence[int]) -> list[Prompt]:
        return [dataclasses.replace(self.members[indices[place]], index=place) for place in positions]


def rendered_sets(**sets: Sequence[Prompt]) -> EvaluationSets:
    return EvaluationSets({name: Rendered(prompts) for name, prompts in sets.items()})  # type: ignore[arg-type]
