"""The episode that a reward judges, and the score that it may return (docs/rewards.md)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from a2tgpo.protocol.protocol import AgentProtocol, ResponseFormat
from a2tgpo.trajectory import Prompt, Trajectory, Turn


class RewardError(RuntimeError):
    """Raised if a reward cannot judge a rollout, and the policy is not to blame. The message is one line.

    The step then does not train on the rollout.
    """


@dataclass(frozen=True, kw_only=True)
class EpisodeCall:
    """A tool call."""

    tool: str
    text: str
    """Input of the tool: a query, or the JSON of several arguments."""
    problem: str | None
    """What is wrong with the call. None if nothing is wrong. A wrong call is not passed to a tool."""
    failed: bool
    """Whether the tool gave no answer."""


@dataclass(frozen=True, kw_only=True)
class EpisodeTurn:
    """A text of the policy, the tool calls in this text, and the observation that followed."""

    text: str
    calls: tuple[EpisodeCall, ...]
    """Empty for the final turn."""
    read_observation: Callable[[], str] = field(repr=False)

    @functools.cached_property
    def observation(self) -> str:
        """The observation as the policy read it. Empty for the final turn."""
        return self.read_observation()


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A rollout that has ended, as plain values."""

    question_id: str
    question: str
    answers: tuple[str, ...]
    """The gold answer and its aliases. Empty if the question has none."""
    record: Mapping[str, Any]
    """The question's whole record in its file."""
    sample_index: int
    """Index of the rollout in its group."""
    turns: tuple[EpisodeTurn, ...]
    answer: str | None
    """The policy's answer, or None if the response has none."""
    format_ok: bool
    stop_reason: str
    """Why the rollout ended (see `Trajectory.stop_reason`)."""
    num_tokens: int
    """Number of tokens of the response: sampled tokens and observations."""
    is_evaluation: bool
    """Whether an evaluation, not a training step, played the rollout."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A reward may return a score instead of a number."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Further numbers, which are recorded but do not change the reward."""
    turn_scores: Sequence[float | None] | None = None
    """One entry for each turn with tool calls: how much the turn increased the chance of success, or None if that is
    unknown. `algorithm.turn_signal=scores` uses these values in place of information gains."""


class Reward(Protocol):
    """Judges rollouts. Many threads may call `score` at the same time.

    A reward that reads `Episode.answers` has the class attribute `needs_answers = True`.
    """

    def score(self, episode: Episode) -> float | Score:
        """Return the reward of a rollout.

        Raises:
            RewardError: the rollout cannot be judged.
        """


@dataclass(frozen=True, kw_only=True)
class EpisodeReader:
    """Converts trajectories to episodes."""

    format: ResponseFormat
    """Finds the answer in a response, and judges the response's format."""
    decode: Callable[[Sequence[int]], str] = field(repr=False)
    """Converts tokens to text."""

    def read(
        self,
        trajectory: Trajectory,
        prompt: Prompt,
        turn_texts: Sequence[str],
        *,
        is_evaluation: bool = False,
    ) -> Episode:
        """Return the episode of a trajectory that has ended.

        Args:
            turn_texts: the policy's text of each turn.
        """
        answer = self.format.answer_of(trajectory, turn_texts)
        return Episode(
            question_id=prompt.id,
            question=prompt.question,
            answers=prompt.answers,
            record=MappingProxyType(json.loads(prompt.record)),
            sample_index=trajectory.sample_index,
            turns=tuple(map(self._turn, trajectory.turns, turn_texts)),
            answer=answer,
            format_ok=answer is not None and self.format.is_well_formed(trajectory, turn_texts),
            stop_reason=trajectory.stop_reason,
            num_tokens=trajectory.num_tokens - len(trajectory.prompt_tokens),
            is_evaluation=is_evaluation,
        )

    def _turn(self, turn: Turn, text: str) -> EpisodeTurn:
        calls = (
            EpisodeCall(tool=call.tool, text=call.arguments, problem=call.problem, failed=call.failed)
            for call in turn.calls
        )
        return EpisodeTurn(
            text=text, calls=tuple(calls), read_observation=lambda: self.decode(turn.observation_tokens)
        )


def reader_of(protocol: AgentProtocol) -> EpisodeReader:
    """Return the reader for trajectories that were played with `protocol`."""

    def decode(tokens: Sequence[int]) -> str:
        text = protocol.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    return EpisodeReader(format=protocol.format, decode=decode)
