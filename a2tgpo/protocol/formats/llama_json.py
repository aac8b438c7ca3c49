"""The call of Llama 3: the whole turn is one JSON object, optionally after <|python_tag|>."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from a2tgpo.protocol.call_format import CallFormat, WrittenCall, decode_object, dump_json, read_call

PYTHON_TAG = "<|python_tag|>"
_LOOKS_LIKE_A_CALL = re.compile(r'\{\s*"(?:name|type|function)"')


class LlamaJson:
    """A call is {"name": NAME, "parameters": {...}}. No text may follow a call, so a turn has at most one call."""

    tags: tuple[str, ...] = (PYTHON_TAG,)

    def find_calls(self, text: str) -> list[WrittenCall]:
        call = text.strip()
        has_tag = call.startswith(PYTHON_TAG)
        call = call.removeprefix(PYTHON_TAG).lstrip()
        if not has_tag and not _LOOKS_LIKE_A_CALL.match(call):
            return []
        try:
            value, end = decode_object(call, 0)
        except ValueError as error:
            problem = f"the call is not valid JSON: {getattr(error, 'msg', error)}"
            return [WrittenCall(text=call, problem=problem)]
        if end < len(call):
            return [WrittenCall(text=call, problem="there is text after the JSON object of the call")]
        return [read_call(call, value, keys=("parameters", "arguments"))]

    def write(self, text: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        if not calls:
            return text
        # The template leaves out the text of a turn with a call.
        ((name, arguments),) = calls
        return f'{{"name": {dump_json(name)}, "parameters": {dump_json(arguments)}}}'


FORMAT: CallFormat = LlamaJson()
