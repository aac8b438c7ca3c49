"""Convert a demonstration to the trajectory that a rollout in the chat protocol would record."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from a2tgpo.data.demonstrations import DemonstratedCall, Demonstration, call_at_end
from a2tgpo.data.thought import THINK_OPEN
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.call_arguments import ArgumentError, argument_text, one_text
from a2tgpo.protocol.tag_syntax import split_result
from a2tgpo.trajectory import Call, LogProbs, TokenIds, Trajectory, Turn

if TYPE_CHECKING:
    from a2tgpo.protocol.chat import ChatProtocol

_ANSWER_TAG = re.compile(r"\s*</?answer>\s*")


def to_trajectory(demonstration: Demonstration, protocol: ChatProtocol, *, prompt_index: int) -> Trajectory:
    """Return the trajectory of a demonstration, with log-probs of 0.

    A demonstration may have `calls`, or be a recorded rollout of this protocol, or be in tags. Calls in tags become
    calls of the protocol, and the answer loses its tags.

    Raises:
        ConfigError: with a one-line message, if a call does not fit its tool.
    """
    question = demonstration.question
    turns = []
    for text, calls in _visible_turns(demonstration, protocol):
        if protocol.format.starts_in_thought:
            text = text.removeprefix(THINK_OPEN)
        turns.append(_to_turn(text, calls, protocol, where=f"demonstration {question.id!r}"))
    return Trajectory(
        prompt_index=prompt_index,
        prompt_id=question.id,
        sample_index=0,
        prompt_tokens=TokenIds(protocol.template.render(question.question)),
        turns=turns,
        stop_reason="answer",
        hops=question.hops,
    )


def _visible_turns(
    demonstration: Demonstration, protocol: ChatProtocol
) -> list[tuple[str, tuple[DemonstratedCall, ...]]]:
    """Return the text and the calls of each turn."""
    if demonstration.calls:
        texts = [text for text, _ in demonstration.turns]
        return list(zip(texts, demonstration.calls, strict=True))
    turns: list[tuple[str, tuple[DemonstratedCall, ...]]] = []
    for text, observation in demonstration.turns:
        text = protocol.without_end(text)
        if observation is None:
            turns.append((_ANSWER_TAG.sub(" ", text).strip(), ()))
            continue
        if (recorded := _recorded(text, observation, protocol)) is not None:
            turns.append(recorded)
            continue
        found = call_at_end(text)
        assert found is not None, "checked when the file was read"
        tool, query = found
        arguments = one_text(protocol.parameters_of(tool) or {}, query)
        if arguments is None:
            raise ConfigError(
                f"warmstart.demonstrations: demonstration {demonstration.question.id!r} calls {tool} with one text; "
                "allowed: a tool of tools.names that takes one text, or `calls` (docs/protocols.md)"
            )
        before = text[: text.rfind(f"<{tool}>")].strip()
        result = split_result(observation)[1]
        turns.append((before, (DemonstratedCall(tool=tool, arguments=arguments, result=result),)))
    return turns


def _recorded(
    text: str, observation: str, protocol: ChatProtocol
) -> tuple[str, tuple[DemonstratedCall, ...]] | None:
    """Return the text and the calls of a turn, or None if no rollout of this protocol could
    have written the turn."""
    visible = protocol.format.visible(text)
    written = protocol.call_format.find_calls(visible)
    results = protocol.frames.split(observation, len(written))
    if not written or results is None or any(call.arguments is None for call in written):
        return None
    thought = text[: len(text) - len(visible)]
    calls = tuple(
        DemonstratedCall(tool=call.name, arguments=call.arguments or {}, result=result)
        for call, result in zip(written, results, strict=True)
    )
    return thought + visible.partition(protocol.call_format.tags[0])[0].rstrip(), calls


def _to_turn(text: str, calls: tuple[DemonstratedCall, ...], protocol: ChatProtocol, *, where: str) -> Turn:
    written = protocol.call_format.write(text, [(call.tool, call.arguments) for call in calls])
    end = protocol.frames.end_token if calls else protocol.answer_end
    tokens = TokenIds([*protocol.encode_turn(written), end])
    turn = Turn(tokens=tokens, rollout_logprobs=LogProbs([0.0] * len(tokens)))
    if calls:
        turn.calls = [_to_call(call, protocol, where) for call in calls]
        turn.observation_tokens = TokenIds(protocol.encode_results([call.result for call in calls]))
    return turn


def _to_call(call: DemonstratedCall, protocol: ChatProtocol, where: str) -> Call:
    parameters = protocol.parameters_of(call.tool)
    if parameters is None:
        raise ConfigError(f"warmstart.demonstrations: {where} calls {call.tool}, which tools.names lacks")
    try:
        return Call(tool=call.tool, arguments=argument_text(call.arguments, parameters))
    except ArgumentError as error:
        raise ConfigError(f"warmstart.demonstrations: {where} calls {call.tool}, but {error}") from None
