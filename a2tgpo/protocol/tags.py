"""The protocol of tags: the policy calls the tool NAME with <NAME> text </NAME>, and answers in <answer> tags."""

from __future__ import annotations

from collections.abc import Sequence

from a2tgpo.data.demonstrations import Demonstration
from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.data.template import PromptTemplate
from a2tgpo.data.thought import THINK_CLOSE, THINK_OPEN, thought_is_open
from a2tgpo.protocol.protocol import AgentProtocol, CallResult, Observation, ParsedTurn
from a2tgpo.protocol.tag_demonstration import to_trajectory
from a2tgpo.protocol.tag_format import TagFormat
from a2tgpo.protocol.tag_observation import ObservationEncoder
from a2tgpo.protocol.tag_syntax import CallSyntax
from a2tgpo.trajectory import Call, Trajectory

SCAFFOLD = "</think> <answer> \\boxed{"


class TagProtocol(AgentProtocol):
    """Reads and writes tags.

    Args:
        multiline: names of the tools whose calls keep their line breaks and indents.
        scaffold: text between a context and the gold answer. A </think> at its beginning is left out after a context
            without an open thought. A <think> at its beginning is left out after a context with an open thought.
        max_part_tokens: number of tokens to which each part of a tool's answer is cut.
    """

    def __init__(
        self,
        template: PromptTemplate,
        *,
        tools: Sequence[str],
        multiline: Sequence[str] = (),
        scaffold: str = SCAFFOLD,
        max_part_tokens: int = 400,
    ):
        super().__init__(template, tools=tools)
        self.format = TagFormat(tools=self.tools, opening_tags=template.opening_tags)
        self._syntax = CallSyntax(self.tools, multiline=multiline)
        self.stop_strings = self._syntax.stop_strings
        self._observations = ObservationEncoder(
            self.tokenizer, syntax=self._syntax, max_part_tokens=max_part_tokens
        )
        self._starts_in_thought = thought_is_open(template.opening_tags)
        self._outside, self._inside = LiteralEncoder(self.tokenizer).encode_parts(
            [scaffold.removeprefix(THINK_CLOSE), scaffold.removeprefix(THINK_OPEN)]
        )
        self.max_scaffold_tokens = max(len(self._outside), len(self._inside))

    def parse(self, text: str, *, finish_reason: str, stop_string: str | None) -> ParsedTurn:
        tool = self._syntax.tool_of(stop_string)
        if tool is not None:
            query = self._syntax.find_query(text, tool)
            if not query:
                return ParsedTurn(stop_reason="empty_query")
            return ParsedTurn(calls=(Call(tool=tool, arguments=query),))
        if stop_string is not None:
            return ParsedTurn(stop_reason="answer")
        return ParsedTurn(stop_reason="length" if finish_reason == "length" else "eos")

    def min_observation_tokens(self, num_calls: int) -> int:
        return self._observations.min_tokens

    def observe(self, results: Sequence[CallResult], *, room: int) -> Observation:
        (result,) = results  # a turn ends with its first call
        if result.error is None:
            tokens = self._observations.encode(result.parts)
        else:
            tokens = self._observations.encode_failure(result.call.tool, result.error)
        return Observation(tokens=self._observations.fit(tokens, room), is_shortened=len(tokens) > room)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of a turn. If the last token has text after the tag that ended the turn, cut this text."""
        ends = (self.tokenizer.eos_token_id, *self.stop_tokens)
        kept = [token for token in tokens if token not in ends]
        text = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self._syntax.cut_at_stop(str(text))

    def scaffold(self, trajectory: Trajectory, num_turns: int) -> list[int]:
        written = "".join(
            str(self.tokenizer.decode(turn.tokens.tolist(), skip_special_tokens=False))
            for turn in trajectory.turns[:num_turns]
        )
        return self._inside if thought_is_open(written, before=self._starts_in_thought) else self._outside

    def demonstrate(self, demonstration: Demonstration, *, prompt_index: int) -> Trajectory:
        return to_trajectory(
            demonstration, template=self.template, tools=self.tools, prompt_index=prompt_index
        )
