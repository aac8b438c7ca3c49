"""Demonstrations: written trajectories for the supervised warm start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.data.protocol import THINK_OPEN, tag_pattern, thought_is_open, without_tags
from a2tgpo.data.question_set import Question, parse_question
from a2tgpo.data.records import stated
from a2tgpo.data.template import PromptTemplate
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.json_lines import read_json_lines, text_field
from a2tgpo.trajectory import LogProbs, TokenIds, Trajectory, Turn

_RESULT = re.compile(r"(\s*<result>\s*)?(.*?)(\s*</result>\s*)?", re.DOTALL)
"""Splits an observation into the opening tag, the tool's answer and the closing tag.

The spaces around a tag stay with the tag, because a tokenizer may encode tag and spaces as one token.
"""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A question with the turns that a policy should write and the observations that it would get."""

    question: Question
    turns: tuple[tuple[str, str | None], ...]
    """For each turn, the policy's text and the observation after it. Only the last turn's observation is None."""
    quality: str = ""
    """Quality label of the data set, used only in reports."""


def load_demonstrations(path: str, *, key: str = "warmstart.demonstrations") -> list[Demonstration]:
    """Return every demonstration of a JSONL file, in file order.

    A record has the fields of a question (see `load_questions`) and the field `turns`, a list of
    {"text", "observation"}. Every turn except the last has an observation and ends with a call, <NAME> text </NAME>.
    Several demonstrations of one question may have the same id.

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
        if _call_at_end(text) is None:
            raise ConfigError(f"{turn_where}: `text` must end with a call, like <search> query </search>")
        turns.append((text, observation))
    quality = record.get("quality")
    return Demonstration(
        question=parse_question(record, where, default_id=default_id),
        turns=tuple(turns),
        quality=quality if isinstance(quality, str) else "",
    )


def to_trajectory(
    demonstration: Demonstration,
    *,
    template: PromptTemplate,
    tools: Sequence[str],
    prompt_index: int,
    append_eos: bool = False,
) -> Trajectory:
    """Convert a demonstration to the trajectory that a rollout would record, with log-probs of 0.

    As in a rollout, the prompt, each turn's text and each observation are tokenised separately. In a turn's text,
    only the protocol's tags can become control tokens. In an observation, only the two tags that enclose it can. If
    the prompt already opened a thought, the <think> at the beginning of the first turn is removed.

    Args:
        tools: names of the tools that the policy may call.
        prompt_index: value of `Trajectory.prompt_index`.
        append_eos: whether to append the end-of-sequence token to the last turn, so that this token is trained.

    Raises:
        ConfigError: if `append_eos` is set but the tokenizer has no end-of-sequence token.
    """
    tokenizer = template.tokenizer
    tags, encoder = tag_pattern(tools), LiteralEncoder(tokenizer)
    texts = [text for text, _ in demonstration.turns]
    if thought_is_open(template.opening_tags):
        texts[0] = texts[0].lstrip().removeprefix(THINK_OPEN)
    turns = [
        _to_turn(encoder, tags, text, observation)
        for text, (_, observation) in zip(texts, demonstration.turns, strict=True)
    ]
    if append_eos:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"model.path: the tokenizer of {tokenizer.name_or_path} has no eos token to train on"
            )
        turns[-1].tokens.append(tokenizer.eos_token_id)
        turns[-1].rollout_logprobs.append(0.0)
    return Trajectory(
        prompt_index=prompt_index,
        prompt_id=demonstration.question.id,
        sample_index=0,
        prompt_tokens=TokenIds(template.render(demonstration.question.question)),
        turns=turns,
        stop_reason="answer",
        hops=demonstration.question.hops,
    )


def _to_turn(encoder: LiteralEncoder, tags: re.Pattern[str], text: str, observation: str | None) -> Turn:
    tokens = TokenIds(encoder.encode_tagged(text, tags))
    turn = Turn(tokens=tokens, rollout_logprobs=LogProbs([0.0] * len(tokens)))
    if observation is not None:
        before, body, after = _RESULT.fullmatch(observation).groups(default="")  # type: ignore[union-attr]
        turn.observation_tokens = TokenIds(encoder.encode_between(before, without_tags(body, tags), after))
        call = _call_at_end(text)
        assert call is not None, "checked when the file was read"
        turn.tool, turn.query = call
    return turn


def _call_at_end(text: str) -> tuple[str, str] | None:
    """Return name and text of the tool call at the end of a turn, or None if the turn does not end with a call."""
    closing = re.search(r"</(\w+)>$", text)
    if closing is None:
        return None
    _, opening, query = text[: closing.start()].rpartition(f"<{closing[1]}>")
    return (closing[1], query.strip()) if opening else None
