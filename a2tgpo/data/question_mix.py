"""Load the training questions, which may be a mix of several files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.data.question_set import Question, load_questions
from a2tgpo.io.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class QuestionMix:
    """The questions of several files, one file after the other."""

    questions: list[Question]
    """If there are several files, each id begins with the name of its set and a slash."""
    sizes: list[int]
    """Number of questions of each file."""
    weights: list[float]
    """Weight of each file, as in `data.train`."""


def load_question_mix(
    files: Mapping[str, float], *, key: str = "data.train", need_answers: bool = True
) -> QuestionMix:
    """Return the questions of all `files`, which map each path to its weight.

    Raises:
        ConfigError: with a one-line message, if a file cannot be read, or if two files have the same set name.
    """
    sets = {file: load_questions(file, key=key, need_answers=need_answers) for file in files}
    if len(sets) > 1:
        names = set_names(list(files), key)
        sets = {
            file: [dataclasses.replace(question, id=f"{names[file]}/{question.id}") for question in questions]
            for file, questions in sets.items()
        }
    return QuestionMix(
        questions=[question for questions in sets.values() for question in questions],
        sizes=[len(questions) for questions in sets.values()],
        weights=list(files.values()),
    )


def set_names(files: list[str], key: str) -> dict[str, str]:
    """Return the name of the set in each file. Raise `ConfigError` if two files have the same set name."""
    names = {file: set_name(Path(file)) for file in files}
    for file, name in names.items():
        if other := next((f for f, n in names.items() if n == name and f != file), None):
            raise ConfigError(f"{key}: {file} and {other} are both called {name!r}; rename one of the files")
    return names


def set_name(file: Path) -> str:
    """Return a set's name: "hotpotqa" for data/hotpotqa/test.jsonl, "bamboogle" for data/bamboogle.jsonl."""
    return file.parent.name if file.stem in ("test", "dev", "train") and file.parent.name else file.stem
