"""Convert a demonstration in tags to the trajectory that a rollout would record."""

from __future__ import annotations

import re
from collections.abc import Sequence

from a2tgpo.data.demonstrations import Demonstration, call_at_end
from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.data.template import PromptTemplate
from a2tgpo.data.thought import THINK_OPEN, thought_is_open
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.tag_syntax import split_result, tag_pattern, without_tags
from a2tgpo.trajectory import Call, LogProbs, TokenIds, Trajectory, Turn


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
    only the protocol's tags can become control tokens. In an observation, only the first and the last
    tag can become control tokens. If the prompt already opened a thought, the <think> at the beginning of the first
    turn is removed.

    Args:
        tools: names of the tools that the policy may call.
        prompt_index: value of `Trajectory.prompt_index`.
        append_eos: whether to append the end-of-sequence token to the last turn, so that the policy learns it.

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
        before, body, after = split_result(observation)
        turn.observation_tokens = TokenIds(encoder.encode_between(before, without_tags(body, tags), after))
        call = call_at_end(text)
        assert call is not None, "checked when the file was read"
        turn.calls = [Call(tool=call[0], arguments=call[1])]
    return turn
