"""Question sets: the questions for the policy and their gold answers."""

import dataclasses
import datetime
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from a2tgpo.data.records import read_records
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.json_lines import text_field


@dataclass(frozen=True, kw_only=True)
class Question:
    id: str
    """Identifier that is unique in the question's set."""
    question: str
    answers: tuple[str, ...]
    """The gold answer, then its aliases. At least one text."""
    hops: int = 0
    """Number of searches that the question needs, or 0 if the set does not state the number."""
    source: str = ""
    """Name of the set that the question is from (`data_source`), or empty if the file names no set."""
    record: str = "{}"
    """The whole record of the file as JSON, for rewards and tools."""


def load_questions(path: str, *, key: str = "data.train", need_answers: bool = True) -> list[Question]:
    """Return every question of a JSONL or Parquet file, in file order.

    A record has a question (see `question_of`) and answers (see `answers_of`). The record may also have `id` (a text
    or an integer; the default is the record's position), `data_source` (a text) and `hops` (an integer >= 0).
    Duplicate ids are made unique (see `unique_ids`).

    Args:
        key: the configuration key that names `path`, for error messages.
        need_answers: whether a record must have answers.

    Raises:
        ConfigError: with a one-line message, if the file cannot be read, if a record is malformed, or if the file has
            no question.
    """
    questions: list[Question] = []
    for index, (where, record) in enumerate(read_records(Path(path), key=key)):
        questions.append(parse_question(record, where, default_id=str(index), need_answers=need_answers))
    if not questions:
        raise ConfigError(f"{key}: {path} has no question; give a file with at least one")
    ids = unique_ids([question.id for question in questions], [question.source for question in questions])
    return [
        question if question.id == identity else dataclasses.replace(question, id=identity)
        for question, identity in zip(questions, ids, strict=True)
    ]


def parse_question(record: dict, where: str, *, default_id: str, need_answers: bool = True) -> Question:
    """Return the question in `record`, which must not have null fields.

    Raises:
        ConfigError: with a message that starts with `where`, if the record is malformed.
    """
    identity = whole_number(record.get("id", default_id))
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise ConfigError(f"{where}: `id` is {identity!r:.60}; allowed: a text or an integer")
    hops = whole_number(record.get("hops", 0))
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 0:
        raise ConfigError(f"{where}: `hops` is {hops!r:.60}; allowed: an integer >= 0")
    return Question(
        id=str(identity),
        question=question_of(record, where),
        answers=_golds(record, where, need_answers=need_answers),
        hops=hops,
        source=source_of(record),
        record=_as_json(record, where),
    )


def _golds(record: dict, where: str, *, need_answers: bool) -> tuple[str, ...]:
    """Return the gold answers of a record. If `need_answers` is False, the record may have none."""
    try:
        name, answers = answers_of(record, where)
    except ConfigError as error:
        if not need_answers:
            return ()
        raise ConfigError(
            f"{error}; only algorithm.turn_signal=scores with rewards that read no answers needs none"
        ) from None
    if not need_answers and answers == []:
        return ()
    if isinstance(answers, str) and name in _ONE_OR_MANY:
        answers = [answers]
    if not isinstance(answers, list | tuple):
        _refuse_number(answers, where, name)
        raise ConfigError(f"{where}: `{name}` is {answers!r:.60}; allowed: a list with at least one answer")
    for answer in answers:
        _refuse_number(answer, where, name)
    golds = tuple(gold_text(answer) if isinstance(answer, str) else "" for answer in answers)
    if not all(golds) or not golds:
        raise ConfigError(
            f"{where}: `{name}` is {list(answers)!r:.60}; allowed: at least one answer, none of them empty"
        )
    return golds


def _as_json(record: dict, where: str) -> str:
    """Return `record` as JSON. Dates and decimal numbers of a Parquet file become texts."""

    def text_of(value: Any) -> str:
        if isinstance(value, datetime.date | datetime.time | datetime.timedelta | Decimal):
            return str(value)
        raise ConfigError(
            f"{where}: a field holds {type(value).__name__}, for example {value!r:.40}; allowed: texts, numbers, "
            "dates, lists and objects; remove the column"
        )

    return json.dumps(record, ensure_ascii=False, default=text_of)


def gold_text(text: str) -> str:
    """Return a gold answer in the form in which a policy would write it.

    Characters are composed (Unicode's NFC), and each run of spaces becomes one space. Invisible marks are removed.
    Joiners are kept, because they change how letters look.
    """
    text = unicodedata.normalize("NFC", text)
    shown = (c for c in text if unicodedata.category(c) != "Cf" or c in _JOINERS)
    return " ".join("".join(shown).split())


_JOINERS = "\u200c\u200d"


def whole_number(value: Any) -> Any:
    """Return a float that is a whole number as an int, and any other value unchanged.

    pandas writes the integer 2 as 2.0 if other values of the column are missing.
    """
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_number(value: Any, where: str, name: str) -> None:
    """Raise `ConfigError` if `value` is a number or a boolean, because its text form is ambiguous."""
    if isinstance(value, bool | int | float):
        kind = "true or false" if isinstance(value, bool) else "a number"
        raise ConfigError(
            f"{where}: `{name}` holds {value!r:.60}, which is {kind}; allowed: texts, in quotes "
            "(tools/prepare_data.py jsonl writes them: yes or no, and numbers in digits)"
        )


_GROUND_TRUTH = "reward_model.ground_truth"
_ONE_OR_MANY = ("answer", _GROUND_TRUTH, f"{_GROUND_TRUTH}.target")
"""Fields that contain a single text in some sets, and a list of texts in other sets."""


def answers_of(record: dict, where: str) -> tuple[str, Any]:
    """Return the name and the value of the first field of `record` that holds answers.

    The fields are `answers`, `golden_answers`, `answer` and `reward_model.ground_truth`. If the last of these is an
    object, as in verl's training sets for search agents, the answers are in the object's field `target`.

    Raises:
        ConfigError: with a message that starts with `where`, if the record has none of these fields.
    """
    for name in ("answers", "golden_answers", "answer"):
        if name in record:
            return name, record[name]
    rule = record.get("reward_model")
    truth = rule.get("ground_truth") if isinstance(rule, dict) else None
    if isinstance(truth, dict):
        truth, name = truth.get("target"), f"{_GROUND_TRUTH}.target"
    else:
        name = _GROUND_TRUTH
    if truth is None:
        raise ConfigError(
            f"{where}: `answers` is missing; give a list of texts as answers (or golden_answers, answer, "
            f"{_GROUND_TRUTH}.target); the fields are {', '.join(map(str, record)):.200}"
        )
    return name, truth


def question_of(record: dict, where: str) -> str:
    """Return the text of the field `question`, or of the last user message in `prompt` if there is no such field.

    Raises:
        ConfigError: with a message that starts with `where`, if the record has no question or the question is not a
            text.
    """
    messages = record.get("prompt")
    if "question" in record or not isinstance(messages, list):
        return text_field(record, "question", where)
    user_messages = [
        message for message in messages if isinstance(message, dict) and message.get("role") == "user"
    ]
    if not user_messages:
        raise ConfigError(f"{where}: `question` is missing, and `prompt` has no message of role user")
    return text_field(user_messages[-1], "content", f"{where}, `prompt`")


def source_of(record: dict) -> str:
    """Return the name of the set that a record is from (`data_source`), or an empty text."""
    source = record.get("data_source")
    return source if isinstance(source, str) else ""


def unique_ids(ids: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Return `ids`, changed so that each is unique.

    A duplicate id becomes SOURCE/ID if its record has a source. If ids are still equal, the second gets the suffix
    #2, the third #3, and so on.

    Args:
        sources: the source of each record (see `source_of`).
    """
    counts = Counter(ids)
    if len(counts) == len(ids):
        return list(ids)
    named = [
        f"{source}/{identity}" if source and counts[identity] > 1 else identity
        for identity, source in zip(ids, sources, strict=True)
    ]
    taken, unique = set(named), []
    seen: Counter[str] = Counter()
    for identity in named:
        seen[identity] += 1
        if seen[identity] == 1:
            unique.append(identity)
            continue
        while (renamed := f"{identity}#{seen[identity]}") in taken:
            seen[identity] += 1
        taken.add(renamed)
        unique.append(renamed)
    return unique
