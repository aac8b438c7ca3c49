"""The calls of Hermes, Qwen2.5 and Qwen3: a JSON object in <tool_call> tags, any number of them in a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from a2tgpo.protocol.call_format import (
    MAX_CALLS,
    CallFormat,
    WrittenCall,
    decode_object,
    dump_json,
    read_call,
)

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    """A call is <tool_call> {"name": NAME, "arguments": {...}} </tool_call>. The last closing tag may be missing."""

    tags: tuple[str, ...] = (OPEN, CLOSE)

    def find_calls(self, text: str) -> list[WrittenCall]:
        calls: list[WrittenCall] = []
        position = text.find(OPEN)
        while position >= 0 and len(calls) < MAX_CALLS:
            call, end = _call_at(text, position + len(OPEN))
            calls.append(call)
            position = text.find(OPEN, end)
        return calls

    def write(self, text: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        written = [
            f'{OPEN}\n{{"name": {dump_json(name)}, "arguments": {dump_json(arguments)}}}\n{CLOSE}'
            for name, arguments in calls
        ]
        return "\n".join([text, *written] if text else written)


FORMAT: CallFormat = Hermes()


def _call_at(text: str, start: int) -> tuple[WrittenCall, int]:
    """Return the call whose opening tag ends at `start`, and the position from which to look for the next call."""
    begin = start
    while begin < len(text) and text[begin].isspace():
        begin += 1
    try:
        value, end = decode_object(text, begin)
    except ValueError as error:
        return _broken(text, start, f"the call is not valid JSON: {_reason(error)}")
    following = end
    while following < len(text) and text[following].isspace():
        following += 1
    if text.startswith(CLOSE, following):
        return read_call(text[begin:end], value, keys=("arguments",)), following + len(CLOSE)
    if following == len(text) or text.startswith(OPEN, following):
        return read_call(text[begin:end], value, keys=("arguments",)), following
    return _broken(text, start, "there is text after the JSON object of the call")


def _broken(text: str, start: int, problem: str) -> tuple[WrittenCall, int]:
    """Return a malformed call, and the position of its end: the next closing or opening tag."""
    following = text.find(OPEN, start)
    end = text.find(CLOSE, start, following if following >= 0 else len(text))
    if end < 0:
        end = following if following >= 0 else len(text)
    return WrittenCall(text=text[start:end].strip(), problem=problem), end


def _reason(error: ValueError) -> str:
    return str(getattr(error, "msg", error))
