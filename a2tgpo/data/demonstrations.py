"""Demonstrations: written trajectories for the supervised warm start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a2tgpo.data.question_set import Question, parse_question
from a2tgpo.data.records import stated
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.json_lines import read_json_lines, text_field


@dataclass(frozen=True, kw_only=True)
class DemonstratedCall:
    """A tool call that a policy should write, and the result that it would get."""

    tool: str
    arguments: Mapping[str, Any]
    result: str


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A question with the turns that a policy should write and the observations that it would get."""

    question: Question
    turns: tuple[tuple[str, str | None], ...]
    """For each turn, the policy's text and an observation, which is None if the turn is last or has `calls`."""
    calls: tuple[tuple[DemonstratedCall, ...], ...] = ()
    """The calls of each turn. Empty if the texts contain the calls as tags."""
    quality: str = ""
    """Optional label of the demonstration, for people."""


def load_demonstrations(path: str, *, key: str = "warmstart.demonstrations") -> list[Demonstration]:
    """Return every demonstration of a JSONL file, in file order.

    A record has the fields of a question (see `load_questions`) and the field `turns`, a list of {"text", "calls"}
    or {"text", "observation"}. In the second form, every turn except the last has an observation, and the field
    "text" of the turn ends with a call, <NAME> query </NAME>. Several demonstrations of one question may have the
    same id.

    Raises:
        ConfigError: with a one-line message, if the file cannot be read, if a record is malformed, or if the file has
            no demonstration.
    """
    demonstrations = [
        _parse_demonstration(stated(record), where, default_id=str(index))
        for index, (where, record) in enumerate(read_json_lines(path, key=key))
    ]
    if not demonstrations:
        raise ConfigError(f"{key}: {path} has no demonstration; give a file with at least one")
    return demonstrations


def _parse_demonstration(record: dict, where: str, *, default_id: str) -> Demonstration:
    raw_turns = record.get("turns")
    if (
        not isinstance(raw_turns, list)
        or not raw_turns
        or not all(isinstance(turn, dict) for turn in raw_turns)
    ):
        raise ConfigError(f"{where}: `turns` must be a list with at least one {{text, observation}}")
    quality = record.get("quality")
    if any("calls" in turn for turn in raw_turns):
        texts, calls = _turns_with_calls(raw_turns, where)
        return Demonstration(
            question=parse_question(record, where, default_id=default_id),
            turns=tuple((text, None) for text in texts),
            calls=tuple(calls),
            quality=quality if isinstance(quality, str) else "",
        )
    turns: list[tuple[str, str | None]] = []
    for number, turn in enumerate(raw_turns, start=1):
        turn_where = f"{where}, turn {number} of {len(raw_turns)}"
        text = text_field(turn, "text", turn_where)
        if number == len(raw_turns):
            if turn.get("observation") is not None:
                raise ConfigError(
                    f"{turn_where}: the last turn has an observation; add the turn that follows it"
                )
            turns.append((text, None))
            continue
        observation = text_field(turn, "observation", turn_where)
        if call_at_end(text) is None:
            raise ConfigError(f"{turn_where}: `text` must end with a call, like <search> query </search>")
        turns.append((text, observation))
    return Demonstration(
        question=parse_question(record, where, default_id=default_id),
        turns=tuple(turns),
        quality=quality if isinstance(quality, str) else "",
    )


def _turns_with_calls(turns: list[dict], where: str) -> tuple[list[str], list[tuple[DemonstratedCall, ...]]]:
    """Return the text and the calls of each turn. All turns but the last have calls."""
    texts, calls = [], []
    for number, turn in enumerate(turns, start=1):
        turn_where = f"{where}, turn {number} of {len(turns)}"
        raw_calls = turn.get("calls", [])
        if not isinstance(raw_calls, list) or bool(raw_calls) != (number < len(turns)):
            raise ConfigError(
                f"{turn_where}: `calls` must be a list of {{name, arguments, result}}, with at least one call in "
                "every turn but the last, which has none"
            )
        texts.append(str(turn.get("text", "")) if raw_calls else text_field(turn, "text", turn_where))
        calls.append(tuple(_call(call, turn_where) for call in raw_calls))
    return texts, calls


def _call(call: Any, where: str) -> DemonstratedCall:
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        raise ConfigError(f"{where}: a call must be {{name, arguments, result}}, with a mapping as arguments")
    return DemonstratedCall(
        tool=text_field(call, "name", where),
        arguments=call["arguments"],
        result=text_field(call, "result", where),
    )


def call_at_end(text: str) -> tuple[str, str] | None:
    """Return the name and the text of the tool call at the end of a turn, or None if the turn ends with no call."""
    closing = re.search(r"</(\w+)>$", text)
    if closing is None:
        return None
    _, opening, query = text[: closing.start()].rpartition(f"<{closing[1]}>")
    return (closing[1], query.strip()) if opening else None
