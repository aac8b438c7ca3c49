"""Settings of the evaluations during training, and the question sets of every evaluation."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from a2tgpo.config.expand import ExpandedMapping
from a2tgpo.io.errors import require

_NAME = re.compile(r"[\w.-]+")
SCORES = ("em", "em_format_gated", "f1")
"""Scores with a standard error. `checkpoint.best_by` may name one of them."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """One set of held-out questions."""

    file: str
    max_questions: int
    """Number of questions in an evaluation during training; 0: all."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 10
    """Number of steps between evaluations; 0: no evaluations between the first and the last step. An evaluation
    always follows the last step."""
    at_start: bool = True
    """Evaluate the policy before the first step, as a baseline."""
    max_questions: int = 256
    """Number of questions from each set in an evaluation during training; 0: all. The questions do not depend on the
    seed. Every combination of `data_source` and `hops` contributes its first questions, in proportion to its size.
    Questions with neither field are chosen at equal distances in the file."""
    sets: ExpandedMapping = field(default_factory=dict)
    """Sets of held-out questions by name, instead of data.test. Each value is a file, or a mapping with the keys file
    and max_questions. Example: {nq: nq.jsonl, bamboogle: {file: bamboogle.jsonl, max_questions: 0}}. The EM over all
    questions is logged as evaluation/em. If there are several sets, the EM of each set is logged as
    evaluation/SET/em."""
    samples: int = 0
    """Number of answers per question for mean@k and pass@k, sampled at rollout.temperature in addition to the greedy
    answer. `0`: only the greedy answer."""

    def __post_init__(self) -> None:
        for name in ("every", "max_questions", "samples"):
            require(getattr(self, name) >= 0, f"evaluation.{name}", getattr(self, name), ">= 0")
        for name, value in self.sets.items():
            require(
                isinstance(name, str) and _NAME.fullmatch(name) is not None,
                "evaluation.sets",
                self.sets,
                "names of letters, digits, _, - and .",
            )
            require(
                _is_set(value),
                f"evaluation.sets.{name}",
                value,
                "a file, or {file: FILE, max_questions: N} with an integer N >= 0",
            )

    def files(self, test: str) -> dict[str, EvaluationSet]:
        """Return the sets by name. Without `sets`, the only set is named "test"; its file is `test` (data.test)."""
        return {
            name: EvaluationSet(**{"max_questions": self.max_questions} | _as_mapping(value))
            for name, value in (self.sets or {"test": test}).items()
        }

    def score_names(self, rewards: Iterable[str]) -> list[str]:
        """Return the scores that `checkpoint.best_by` may name. `rewards` are the names of the run's rewards."""
        names = list(dict.fromkeys([*SCORES, *sampled_scores(self.samples), *rewards]))
        return [*names, *(f"{of_set}/{name}" for of_set in self.sets if len(self.sets) > 1 for name in names)]


def sampled_scores(num_samples: int) -> Iterator[str]:
    """Yield the names of the scores over `num_samples` answers per question: mean_at_K, pass_at_2, pass_at_4, ..."""
    if num_samples:
        yield f"mean_at_{num_samples}"
        yield from (f"pass_at_{k}" for k in powers_of_two(num_samples))


def powers_of_two(most: int) -> list[int]:
    """Return the powers of two from 2 to `most`."""
    return [2**power for power in range(1, most.bit_length())]


def _as_mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"file": value}


def _is_set(value: Any) -> bool:
    of_set = _as_mapping(value)
    limit = of_set.get("max_questions", 0)
    return (
        {"file"} <= of_set.keys() <= {"file", "max_questions"}
        and isinstance(of_set["file"], str)
        and bool(of_set["file"])
        and type(limit) is int
        and limit >= 0
    )
