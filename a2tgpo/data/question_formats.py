"""Read question sets in their published formats, item by item.

hotpotqa: hotpot_*_v1*.json is a JSON list. Some answers are yes or no. Each title in `supporting_facts` is a hop.
2wiki: {train,dev}.json is a JSON list. id_aliases.json has aliases for the Wikidata id of an answer.
musique: musique_{ans,full}_v1.0_*.jsonl has aliases. The `full` files also have unanswerable items.
bamboogle: The CSV file has the columns Question and Answer.
nq: NQ-open.*.jsonl and v1.0-simplified_*.jsonl(.gz) have short answers, yes/no answers and unanswerable items. The
    development file v1.0-simplified_* in fact has the full format, which is also supported.
triviaqa: {wikipedia,web,unfiltered-web}-*.json has its items in the list `Data`, with aliases.
popqa: The column possible_answers of the TSV file contains a JSON list.
jsonl: The file is any JSONL or Parquet file that data.train accepts.

Every file except Parquet may be compressed with gzip, bzip2, xz or zstd.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2tgpo.data.question_set import answers_of, gold_text, question_of, source_of, whole_number
from a2tgpo.data.records import read_records
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.json_lines import read_json_lines
from a2tgpo.io.text_file import decode, decode_line, open_unpacked

UNANSWERABLE = "unanswerable"
NO_ANSWER = "no answer"
IN = "--in"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of a published set."""

    where: str
    """The file, and the line or item number, for error messages."""
    question: str
    answers: list[str] = field(default_factory=list)
    """The gold answer, then its aliases. Empty if the set has no answer to the question."""
    id: str | None = None
    """None if the set has no ids."""
    hops: int = 0
    source: str = ""
    """Name of the set that this item is from, if the file joins several sets."""
    left_out: str = ""
    """The reason why the item cannot become a question, or empty if it can."""


def read_items(name: str, path: Path, *, aliases: Path | None = None) -> Iterator[Item]:
    """Yield the items of the set `name` in the file `path`, in file order.

    Args:
        aliases: the file id_aliases.json of 2WikiMultihopQA.

    Raises:
        ConfigError: with a one-line message, if the file cannot be read or has another format, or if an item is
            malformed.
    """
    if aliases is not None and name != "2wiki":
        raise ConfigError(f"--aliases is {str(aliases)!r}; allowed: with 2wiki only")
    if name == "2wiki":
        return _read_2wiki(path, aliases)
    return READERS[name](path)


def _read_hotpotqa(path: Path) -> Iterator[Item]:
    for where, record in _json_items(path, "hotpotqa"):
        titles = {str(fact[0]) for fact in record.get("supporting_facts") or () if fact}
        yield Item(
            where=where,
            id=_text(record, "_id", where),
            question=_text(record, "question", where),
            answers=_texts(record.get("answer", ""), where, "answer"),
            hops=len(titles),
        )


def _read_2wiki(path: Path, aliases: Path | None) -> Iterator[Item]:
    known = _load_aliases(aliases) if aliases is not None else {}
    for where, record in _json_items(path, "2wiki"):
        answers = _texts(record.get("answer", ""), where, "answer")
        if answers:
            answers += known.get(str(record.get("answer_id")), [])
        yield Item(
            where=where,
            id=_text(record, "_id", where),
            question=_text(record, "question", where),
            answers=answers,
            hops=len({str(fact[0]) for fact in record.get("supporting_facts") or () if fact}),
        )


def _load_aliases(path: Path) -> dict[str, list[str]]:
    """Return the names and demonyms of each Wikidata id in id_aliases.json, which has one object per line."""
    known: dict[str, list[str]] = {}
    for where, record in read_json_lines(path, key="--aliases"):
        names = [*(record.get("aliases") or ()), *(record.get("demonyms") or ())]
        known[_text(record, "Q_id", where)] = _texts(names, where, "aliases")
    return known


def _read_musique(path: Path) -> Iterator[Item]:
    for where, record in read_json_lines(path, key=IN):
        identity = _text(record, "id", where)
        hops = re.match(r"(\d)hop", identity)
        answerable = record.get("answerable", True)
        yield Item(
            where=where,
            id=identity,
            question=_text(record, "question", where),
            answers=_texts(record.get("answer", ""), where, "answer")
            + _texts(record.get("answer_aliases") or [], where, "answer_aliases"),
            hops=int(hops[1]) if hops else 0,
            left_out="" if answerable else UNANSWERABLE,
        )


def _read_bamboogle(path: Path) -> Iterator[Item]:
    for where, row in _table(path, delimiter=",", columns=("Question", "Answer")):
        yield Item(
            where=where, question=row["Question"], answers=_texts(row["Answer"], where, "Answer"), hops=2
        )


def _read_nq(path: Path) -> Iterator[Item]:
    for where, record in read_json_lines(path, key=IN):
        if "annotations" in record:
            yield _annotated_nq(where, record)
        else:
            yield Item(
                where=where,
                question=_text(record, "question", where),
                answers=_texts(record.get("answer", []), where, "answer"),
            )


def _annotated_nq(where: str, record: dict) -> Item:
    """Return the item of a Natural Questions record in the simplified or the full format."""
    tokens = _nq_tokens(where, record)
    answers: list[str] = []
    for annotation in record["annotations"]:
        for span in annotation.get("short_answers") or ():
            answers.append(" ".join(filter(None, tokens[span["start_token"] : span["end_token"]])))
        if annotation.get("yes_no_answer", "NONE") != "NONE":
            answers.append(annotation["yes_no_answer"].lower())
    return Item(
        where=where,
        id=str(record.get("example_id", "")) or None,
        question=_text(record, "question_text", where),
        answers=_texts(answers, where, "annotations"),
        # Most items without a short answer have only a long answer. Exact match cannot judge a long answer.
        left_out="" if answers else UNANSWERABLE,
    )


def _nq_tokens(where: str, record: dict) -> list[str]:
    """Return the document's tokens, with an empty text for each HTML tag of the full format.

    The simplified format has the tokens in the text `document_text`, separated by spaces. In the full format, the
    tokens are in the list of objects `document_tokens`.
    """
    if "document_tokens" not in record:
        return _text(record, "document_text", where).split(" ")
    try:
        return ["" if token["html_token"] else str(token["token"]) for token in record["document_tokens"]]
    except (KeyError, TypeError):
        raise ConfigError(
            f"{where}: `document_tokens` is not a list of objects with token and html_token"
        ) from None


def _read_triviaqa(path: Path) -> Iterator[Item]:
    for where, record in _json_items(path, "triviaqa"):
        answer = record.get("Answer") or {}
        if not isinstance(answer, dict):
            raise ConfigError(
                f"{where}: `Answer` is {answer!r:.40}; allowed: an object with Value and Aliases"
            )
        names = [*([answer["Value"]] if answer.get("Value") else []), *(answer.get("Aliases") or ())]
        yield Item(
            where=where,
            id=_text(record, "QuestionId", where),
            question=_text(record, "Question", where),
            answers=_texts(names, where, "Answer"),
        )


def _read_popqa(path: Path) -> Iterator[Item]:
    columns = ("id", "question", "possible_answers")
    for where, row in _table(path, delimiter="\t", columns=columns):
        try:
            answers = json.loads(row["possible_answers"])
        except ValueError:
            raise ConfigError(
                f"{where}: `possible_answers` is not a JSON list: {row['possible_answers']:.60}"
            ) from None
        yield Item(
            where=where,
            id=row["id"],
            question=row["question"],
            answers=_texts(answers, where, "possible_answers"),
            hops=1,
        )


def _read_jsonl(path: Path) -> Iterator[Item]:
    for where, record in read_records(path, key=IN):
        name, answers = answers_of(record, where)
        identity, hops = whole_number(record.get("id")), whole_number(record.get("hops", 0))
        yield Item(
            where=where,
            id=None if identity is None else str(identity),
            question=question_of(record, where),
            answers=_texts(answers, where, name),
            hops=hops if isinstance(hops, int) and hops > 0 else 0,
            source=source_of(record),
        )


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "hotpotqa": _read_hotpotqa,
    "2wiki": lambda path: _read_2wiki(path, None),
    "musique": _read_musique,
    "bamboogle": _read_bamboogle,
    "nq": _read_nq,
    "triviaqa": _read_triviaqa,
    "popqa": _read_popqa,
    "jsonl": _read_jsonl,
}


def _json_items(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    """Yield the records of a JSON document, which is a list or, for TriviaQA, an object {"Data": list}."""
    with open_unpacked(path, key=IN) as stream:
        text = decode(stream.read(), str(path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{path}: not JSON{at}; {name} is published as one JSON document") from None
    records = content
    if name == "triviaqa":
        records = content.get("Data") if isinstance(content, dict) else None
    if not isinstance(records, list):
        wanted = '{"Data": [...]}' if name == "triviaqa" else "a list of items"
        raise ConfigError(f"{path}: not {name}'s format; expected {wanted}")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ConfigError(
                f"{path} item {number}: {type(record).__name__} found; each item must be an object"
            )
        yield f"{path} item {number}", record


def _table(path: Path, *, delimiter: str, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(2**24)
    with open_unpacked(path, key=IN) as stream:
        lines = (decode_line(raw, f"{path} line {number}") for number, raw in enumerate(stream, start=1))
        reader = csv.DictReader(lines, delimiter=delimiter)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(
                f"{path} line 1: no column {missing[0]!r}; the columns are {list(reader.fieldnames or ())!r:.120}"
            )
        try:
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if any(row[column] is None for column in columns):
                    raise ConfigError(f"{where}: fewer fields than columns")
                yield where, row
        except csv.Error as error:
            raise ConfigError(f"{path} line {reader.line_num}: {error}") from None


def _text(record: dict, name: str, where: str) -> str:
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if name not in record else f"{value!r:.60}"
        raise ConfigError(f"{where}: `{name}` is {found}; allowed: a non-empty text")
    return value


def _texts(value: Any, where: str, name: str) -> list[str]:
    """Return the unique, non-empty `gold_text`s of `value` (a text, a number, a boolean, or a list of these)."""
    values = value if isinstance(value, list) else [value]
    texts: list[str] = []
    for entry in values:
        if isinstance(entry, bool):
            entry = "yes" if entry else "no"
        entry = whole_number(entry)  # 1912.0 would become 19120, because exact match removes the point
        if isinstance(entry, int | float):
            entry = str(entry)
        if not isinstance(entry, str):
            raise ConfigError(f"{where}: `{name}` holds {entry!r:.40}; allowed: texts")
        texts.append(gold_text(entry))
    return [text for text in dict.fromkeys(texts) if text]
