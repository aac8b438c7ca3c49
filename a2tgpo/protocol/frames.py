"""Find out how a chat template writes the results of tool calls, by rendering conversations with marked texts.

The policy's turn ends with a control token. The frame of the results is all text that the template writes between
this token and the policy's next turn. The rollout appends the frame to the tokens that the policy sampled, so no
earlier token is ever rendered again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from a2tgpo.data.template import PromptTemplate
from a2tgpo.data.thought import THINK_OPEN
from a2tgpo.io.errors import ConfigError

QUESTION, ARGUMENT = "Which river is it?", "ARGUMENT7"
"""Texts that are searched for in a rendered conversation."""
_RESULTS = ('RESULT1 "a"', 'RESULT2 "b"', 'RESULT3 "c"')
"""Results of the calls in a rendered conversation. Their quotes show whether the template writes results as JSON."""
_MANY = len(_RESULTS)


@dataclass(frozen=True, kw_only=True)
class ResultFrames:
    """The texts that a template writes around results, and the token that precedes these texts."""

    open: str
    between: str
    close: str
    """Text after the last result. It ends with the generation header."""
    end_token: int
    """Id of the control token that ends a turn with calls."""
    is_json: bool
    """Whether results are written inside JSON strings."""
    is_single: bool
    """Whether the template allows only one call in a turn."""
    call_text: str
    """A turn with one call as the template writes it. Its only argument is `ARGUMENT`."""

    def join(self, results: Sequence[str]) -> str:
        """Return all text between the end of a turn and the next turn."""
        inner = [json.dumps(text, ensure_ascii=False)[1:-1] if self.is_json else text for text in results]
        return f"{self.open}{self.between.join(inner)}{self.close}"

    def split(self, text: str, count: int) -> list[str] | None:
        """Return the `count` results that `join` combined into `text`, or None if they cannot be told apart."""
        if not (text.startswith(self.open) and text.endswith(self.close)):
            return None
        body = text[len(self.open) : len(text) - len(self.close)]
        inner = body.split(self.between) if self.between else [body]
        try:
            found = [str(json.loads(f'"{part}"')) if self.is_json else part for part in inner]
        except ValueError:
            return None
        return found if len(found) == count else None


def find_frames(template: PromptTemplate, *, tool: str, argument: str) -> ResultFrames:
    """Return the frames of `template`.

    Args:
        tool: name of a tool.
        argument: name of one of its parameters.

    Raises:
        ConfigError: with a one-line message, if the template cannot render calls and results, or if the frame of
            several results does not consist of the frames of single results.
    """
    one = _render(template, 1, tool, argument)
    if one is None:
        raise ConfigError(
            f"model.path: the chat template of {template.tokenizer.name_or_path} refuses tool calls and their "
            "results; use another template, or rollout.protocol=tags"
        )
    is_json = _RESULTS[0] not in one
    shown = [json.dumps(text)[1:-1] if is_json else text for text in _RESULTS]
    turn, found, after = one.rpartition(ARGUMENT)
    gap, has_result, close = after.partition(shown[0])
    if not found or not has_result:
        raise ConfigError(
            f"model.path: the chat template of {template.tokenizer.name_or_path} leaves out tool calls or their "
            "results; use another template, or rollout.protocol=tags"
        )
    call_end, end_token, opening = _split_at_end(template, gap)
    between = ""
    many = _render(template, _MANY, tool, argument)
    if many is not None:
        between = many.partition(shown[0])[2].partition(shown[1])[0]
    frames = ResultFrames(
        open=opening,
        between=between,
        close=close,
        end_token=end_token,
        is_json=is_json,
        is_single=many is None,
        call_text=_last_turn(template, turn) + ARGUMENT + call_end,
    )
    if many is not None and not many.endswith(frames.join(_RESULTS)):
        raise ConfigError(
            f"model.path: the chat template of {template.tokenizer.name_or_path} writes several results in another "
            "way than one result; use another template, or rollout.protocol=tags"
        )
    return frames


def call_message(calls: Sequence[tuple[str, Mapping[str, Any]]], *, content: str = "") -> dict[str, Any]:
    """Return an assistant's message with `calls`, which are pairs (name, arguments)."""
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {
                "type": "function",
                "id": _call_id(place),
                "function": {"name": name, "arguments": dict(arguments)},
            }
            for place, (name, arguments) in enumerate(calls)
        ],
    }


def result_messages(results: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the messages for `results`, which are pairs (name of the tool, text of the result)."""
    return [
        {"role": "tool", "name": name, "tool_call_id": _call_id(place), "content": text}
        for place, (name, text) in enumerate(results)
    ]


def _call_id(place: int) -> str:
    return f"call{place:05d}"  # 9 letters and digits, which the strictest template demands


def _render(template: PromptTemplate, count: int, tool: str, argument: str) -> str | None:
    calls = [(tool, {argument: ARGUMENT})] * count
    results = [(tool, text) for text in _RESULTS[:count]]
    messages = [{"role": "user", "content": QUESTION}, call_message(calls), *result_messages(results)]
    try:
        return template.conversation(messages, has_header=True)
    except ConfigError:
        return None


def _split_at_end(template: PromptTemplate, gap: str) -> tuple[str, int, str]:
    """Split the text between a call's argument and its result at the token that ends the turn.

    Return the rest of the call, the token's id, and the frame's opening text. If the text has the token that ends an
    answer, this token also ends the turn. Otherwise the first special token does.
    """
    tokenizer = template.tokenizer
    ends = {
        number: str(token)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and str(token) in gap
    }
    usual = [number for number in (template.end_of_turn, tokenizer.eos_token_id) if number in ends]
    if not ends:
        raise ConfigError(
            f"model.path: the chat template of {tokenizer.name_or_path} ends a turn with calls without a control "
            "token; use another template, or rollout.protocol=tags"
        )
    number = usual[0] if usual else min(ends, key=lambda one: gap.index(ends[one]))
    before, _, after = gap.partition(ends[number])
    return before, number, after


def _last_turn(template: PromptTemplate, text: str) -> str:
    """Return the last turn of `text`. It begins after the generation header, or else after the last control token."""
    question = [{"role": "user", "content": QUESTION}]
    prompt, bare = (template.conversation(question, has_header=has_header) for has_header in (True, False))
    # A template may write think tags at the end of a prompt, but not before an earlier turn.
    header = prompt.removeprefix(bare).partition(THINK_OPEN)[0]
    for beginning in (prompt, bare + header):
        if text.startswith(beginning):
            return text[len(beginning) :]
    turn = text.rpartition(QUESTION)[2]
    for token in template.tokenizer.added_tokens_decoder.values():
        turn = turn.rpartition(str(token))[2] if token.special else turn
    return turn
