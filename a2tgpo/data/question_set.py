"""Question sets: what the policy is asked, and what counts as right."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.config.check import ConfigError
from a2tgpo.config.json_lines import read_json_lines, text_field
from a2tgpo.error_line import first_line


@dataclass(frozen=True, kw_only=True)
class Question:
    id: str
    """Unique in its set."""
    question: str
    answers: tuple[str, ...]
    """Gold answer, then its aliases; never empty."""
    hops: int = 0
    """Searches the question needs; 0 where the set does not say."""


def load_questions(path: str, *, key: str = "data.train") -> list[Question]:
    """Every question of a JSONL or Parquet (`.parquet`) file, in file order.

    A record has `question` and `answers` (a list of texts), and may have `id` (text or integer; the
    record's position stands in for it) and `hops` (integer >= 0).

    Args:
        path: the file.
        key: the configuration key that names it, for error messages.

    Raises:
        ConfigError: one line; unreadable file, bad record (with its line or row), repeated id, no question
            at all.
    """
    records = (
        _read_parquet(path, key=key) if Path(path).suffix == ".parquet" else read_json_lines(path, key=key)
    )
    questions = [
        parse_question(record, where, default_id=str(index)) for index, (where, record) in enumerate(records)
    ]
    if not questions:
        raise ConfigError(f"{key}: {path} holds no question; give a file with at least one")
    _check_unique(questions, path, key)
    return questions


def parse_question(record: dict, where: str, *, default_id: str) -> Question:
    """The `Question` in one record; ConfigError starting with `where` if it is not one."""
    answers = record.get("answers")
    if isinstance(answers, str) or not isinstance(answers, Iterable):
        found = "missing" if "answers" not in record else f"{answers!r:.60}"
        raise ConfigError(f"{where}: `answers` is {found}; allowed: a list with at least one answer")
    gold = tuple(answers)
    if not gold or any(not isinstance(answer, str) or not answer.strip() for answer in gold):
        raise ConfigError(
            f"{where}: `answers` is {list(gold)!r:.60}; allowed: at least one answer, none of them empty"
        )
    identity = record.get("id", default_id)
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise ConfigError(f"{where}: `id` is {identity!r:.60}; allowed: a text or an integer")
    hops = record.get("hops", 0)
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 0:
        raise ConfigError(f"{where}: `hops` is {hops!r:.60}; allowed: an integer >= 0")
    return Question(id=str(identity), question=text_field(record, "question", where), answers=gold, hops=hops)


def _check_unique(questions: list[Question], path: str, key: str) -> None:
    seen: dict[str, int] = {}
    for position, question in enumerate(questions, start=1):
        first = seen.setdefault(question.id, position)
        if first != position:
            raise ConfigError(
                f"{key}: {path} has id {question.id!r} at questions {first} and {position}; make it unique"
            )


def _read_parquet(path: str, *, key: str) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            f"{key}: {path} is Parquet, which needs pyarrow; pip install pyarrow, or give JSONL"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises its own family of errors for each way a file can be broken
        raise ConfigError(f"{key}: cannot read {path} as Parquet ({first_line(error):.120})") from None
    for number, row in enumerate(rows, start=1):
        # Parquet has a value in every column of a row: an absent optional field arrives as None.
        yield f"{path} row {number}", {name: value for name, value in row.items() if value is not None}
