"""The protocol of the model's own chat template: calls in the model's format, results in messages of role `tool`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from a2tgpo.config.rollout import call_formats
from a2tgpo.data.demonstrations import Demonstration
from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.data.template import PromptTemplate
from a2tgpo.data.thought import THINK_CLOSE, THINK_OPEN, thought_is_open
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.answer_box import last_box
from a2tgpo.protocol.append_only import template_difference
from a2tgpo.protocol.call_arguments import ArgumentError, argument_text, typed
from a2tgpo.protocol.call_format import CallFormat, WrittenCall, load_format
from a2tgpo.protocol.chat_demonstration import to_trajectory
from a2tgpo.protocol.chat_format import ChatFormat
from a2tgpo.protocol.frames import ARGUMENT, ResultFrames, find_frames
from a2tgpo.protocol.part_cut import PartCut
from a2tgpo.protocol.protocol import AgentProtocol, CallResult, Observation, ParsedTurn
from a2tgpo.protocol.tag_syntax import MAX_REASON_CHARS, without_tags
from a2tgpo.trajectory import Call, Trajectory

AUTO = "auto"
BOX = "\\boxed{"
_TAG = re.compile(r"</?\w+>")
_KEPT_CHARS = 2000
"""Number of characters of a wrong call that are recorded."""


class ChatProtocol(AgentProtocol):
    """Reads the policy's calls in a `CallFormat`, and writes results as the chat template does.

    Args:
        template: a template whose prompts describe the tools.
        schemas: one or more descriptions of tools, as chat templates expect them.
        call_format: name of the call format. "auto" means the format in which the template writes calls.
        max_calls: largest number of calls in one turn. Further calls get an error as their result.
        scaffold: text between a context and the gold answer. An empty text means the usual beginning of an
            answer, after an empty thought if the model thinks.
        is_strict: value of `ChatFormat.is_strict`.
        max_part_tokens: number of tokens to which each part of a tool's answer is cut.

    Raises:
        ConfigError: with a one-line message, if the template cannot render calls, or writes them in another format.
    """

    format: ChatFormat

    def __init__(
        self,
        template: PromptTemplate,
        *,
        schemas: Sequence[Mapping[str, Any]],
        call_format: str = AUTO,
        max_calls: int = 4,
        scaffold: str = "",
        is_strict: bool = True,
        max_part_tokens: int = 400,
    ):
        self._parameters = {str(s["function"]["name"]): s["function"]["parameters"] for s in schemas}
        super().__init__(template, tools=tuple(self._parameters))
        tool, parameters = next(iter(self._parameters.items()))
        argument = next(iter(parameters.get("properties", {})), "query")
        self.probe = tool, argument
        """Names of a tool and of one of its parameters, to render an example."""
        self.frames = find_frames(template, tool=tool, argument=argument)
        self.call_format = _format_of(self.frames, call_format, expected=(tool, {argument: ARGUMENT}))
        self._max_calls = 1 if self.frames.is_single else max_calls
        self.format = ChatFormat(
            calls=self.call_format,
            thinks=_thinks(template),
            opening_tags=template.opening_tags,
            is_strict=is_strict,
        )
        usual_ends = (template.end_of_turn, self.tokenizer.eos_token_id, self.frames.end_token)
        self.answer_end = next(end for end in usual_ends if end is not None)
        """Id of the token that ends an answer."""
        self.stop_tokens = tuple(
            dict.fromkeys(
                end for end in (self.frames.end_token, self.answer_end) if end != self.tokenizer.eos_token_id
            )
        )
        # The model's generation_config.json may name further tokens that end a turn, all of them special.
        self._special = {
            number: str(token)
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self._literal = LiteralEncoder(self.tokenizer)
        self._parts = PartCut(self.tokenizer, self._literal, max_tokens=max_part_tokens)
        self._own_tags = self._pattern_of_tags()
        (self._scaffold,) = self._literal.encode_parts([scaffold or self._usual_scaffold()])
        self.max_scaffold_tokens = len(self._scaffold)
        self._frame_tokens: dict[int, int] = {}

    def parse(self, text: str, *, finish_reason: str, stop_string: str | None) -> ParsedTurn:
        if finish_reason == "length":
            return ParsedTurn(stop_reason="length")
        visible = self.format.visible(self.without_end(text))
        written = self.call_format.find_calls(visible)
        if not written:
            return ParsedTurn(stop_reason="eos" if last_box(visible) is None else "answer")
        return ParsedTurn(calls=tuple(self._call(place, one) for place, one in enumerate(written)))

    def min_observation_tokens(self, num_calls: int) -> int:
        if num_calls not in self._frame_tokens:
            self._frame_tokens[num_calls] = len(
                self._literal.encode_joined([""] * num_calls, self.frames.join)
            )
        return self._frame_tokens[num_calls]

    def observe(self, results: Sequence[CallResult], *, room: int) -> Observation:
        texts = [self.result_text(result) for result in results]
        tokens = self._literal.encode_joined(texts, self.frames.join)
        if len(tokens) <= room:
            return Observation(tokens=tokens, is_shortened=False)
        assert room >= self.min_observation_tokens(len(texts)), f"{room} tokens are too few for the frame"
        return Observation(tokens=self._fitted(texts, room), is_shortened=True)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of a turn without the control token that ended it."""
        kept = list(tokens)
        if kept and kept[-1] in self._special:
            kept.pop()
        text = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def scaffold(self, trajectory: Trajectory, num_turns: int) -> list[int]:
        """Return the same tokens for all contexts, because every context ends with the generation header."""
        return self._scaffold

    def demonstrate(self, demonstration: Demonstration, *, prompt_index: int) -> Trajectory:
        return to_trajectory(demonstration, self, prompt_index=prompt_index)

    @property
    def warning(self) -> str | None:
        if (difference := template_difference(self.template, self.probe, thinks=self.format.thinks)) is None:
            return None
        return (
            "model.path: the chat template changes earlier turns when it renders a whole conversation, so a server "
            f"that does so shows the policy other contexts than the training: {difference}"
        )

    def parameters_of(self, tool: str) -> Mapping[str, Any] | None:
        """Return the parameters of a tool, or None if there is no such tool."""
        return self._parameters.get(tool)

    def result_text(self, result: CallResult) -> str:
        """Return the text that the policy reads for one call, without the protocol's own tags."""
        if result.call.problem is not None:
            text = f"Error: {result.call.problem}"
        elif result.error is not None:
            reason = " ".join(result.error.split())[:MAX_REASON_CHARS]
            text = f"The {result.call.tool} failed: {reason}"
        else:
            text = "\n".join(self._parts.cut(part) for part in result.parts)
        return self._cleaned(text)

    def encode_results(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of an observation with the results `texts`, which are not cut."""
        return self._literal.encode_joined([self._cleaned(text) for text in texts], self.frames.join)

    def encode_turn(self, text: str) -> list[int]:
        """Return the tokens of a turn's text. Only the tags of thoughts and calls can become control tokens."""
        tags = "|".join(map(re.escape, (THINK_OPEN, THINK_CLOSE, *self.call_format.tags)))
        return self._literal.encode_tagged(text, re.compile(tags))

    def _cleaned(self, text: str) -> str:
        return without_tags(text, self._own_tags).strip()

    def _call(self, place: int, written: WrittenCall) -> Call:
        """Return the call at `place` in its turn, with its problem if it has one."""
        raw = written.text[:_KEPT_CHARS]
        if written.problem is not None or written.arguments is None:
            return _wrong(written.name, raw, written.problem or "it has no arguments", "malformed")
        if written.name not in self._parameters:
            known = ", ".join(self.tools)
            return _wrong(
                written.name,
                raw,
                f"there is no tool {written.name!r:.80}; the tools are: {known}",
                "unknown_tool",
            )
        if place >= self._max_calls:
            return _wrong(written.name, raw, f"at most {self._max_calls} calls in one turn", "excess")
        parameters = self._parameters[written.name]
        arguments = typed(written.arguments, parameters) if written.has_texts else written.arguments
        try:
            text = argument_text(arguments, parameters)
        except ArgumentError as error:
            return _wrong(written.name, raw, str(error), "malformed")
        return Call(tool=written.name, arguments=text)

    def _fitted(self, texts: Sequence[str], room: int) -> list[int]:
        """Cut all texts to the same length, the largest that fits in `room`, and return the observation's tokens."""
        fitting = self._literal.encode_joined([""] * len(texts), self.frames.join)
        low, high = 0, max(map(len, texts))
        while low + 1 < high:
            length = (low + high) // 2
            tokens = self._literal.encode_joined([text[:length] for text in texts], self.frames.join)
            if len(tokens) <= room:
                low, fitting = length, tokens
            else:
                high = length
        return fitting

    def _usual_scaffold(self) -> str:
        if self.format.starts_in_thought:
            return f"\n{THINK_CLOSE}\n\n{BOX}"
        return f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n{BOX}" if self.format.thinks else BOX

    def without_end(self, text: str) -> str:
        """Return a turn's text without the control token that ended it."""
        end = next((token for token in self._special.values() if text.endswith(token)), "")
        return text.removesuffix(end)

    def _pattern_of_tags(self) -> re.Pattern[str]:
        frames = self.frames
        tags = {*_TAG.findall(frames.open + frames.between + frames.close), *self.call_format.tags}
        tags |= {THINK_OPEN, THINK_CLOSE}
        return re.compile("|".join(map(re.escape, sorted(tags))))


def _format_of(frames: ResultFrames, name: str, *, expected: tuple[str, Mapping[str, Any]]) -> CallFormat:
    """Return the format `name`. "auto" means the first format that can parse a call that the template rendered."""
    if name != AUTO:
        return load_format(name)
    for one in call_formats():
        found = load_format(one).find_calls(frames.call_text)
        if [(call.name, call.arguments) for call in found] == [expected]:
            return load_format(one)
    known = " | ".join(call_formats())
    raise ConfigError(
        f"rollout.call_format is auto, but the chat template writes calls in none of the known formats ({known}): "
        f"{frames.call_text!r:.200}; name the model's format, or use rollout.protocol=tags"
    )


def _thinks(template: PromptTemplate) -> bool:
    """Return whether the model writes thoughts: the template supports them, and the prompt has no empty thought."""
    if template.opening_tags:
        return thought_is_open(template.opening_tags)
    return THINK_CLOSE in template.tokenizer.get_chat_template()


def _wrong(name: str, text: str, problem: str, kind: str) -> Call:
    return Call(tool=name[:80], arguments=text, problem=problem, problem_kind=kind)
