"""The interface of a protocol, through which the rollout, the rewards and the warm start use the protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from a2tgpo.data.template import PromptTemplate
from a2tgpo.trajectory import Call, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from a2tgpo.data.demonstrations import Demonstration


@dataclass(frozen=True, kw_only=True)
class ParsedTurn:
    """The content of a turn: calls, or the reason why it ends the trajectory."""

    calls: tuple[Call, ...] = ()
    """The calls in the order in which the policy wrote them."""
    stop_reason: str = ""
    """Why the trajectory ends (see `Trajectory.stop_reason`). Empty if the turn has calls."""


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """The result of one call."""

    call: Call
    parts: tuple[str, ...] = ()
    """The parts of the tool's answer, the best part first. Empty if the call has no answer."""
    error: str | None = None
    """Why the tool did not answer, in one line. None if the tool answered."""
    score: float | None = None
    """The score that the tool's session gave after the call. None if it gave no score."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The results of a turn's calls as tokens."""

    tokens: list[int]
    is_shortened: bool
    """Whether the results were cut because they were longer than `room`."""


class ResponseFormat(Protocol):
    """Finds the answer in a response, and judges the response's format."""

    def answer_of(self, trajectory: Trajectory, texts: Sequence[str]) -> str | None:
        """Return the policy's answer, or None if it gave none.

        Args:
            texts: the policy's text of each turn (`AgentProtocol.text_of`).
        """

    def is_well_formed(self, trajectory: Trajectory, texts: Sequence[str]) -> bool:
        """Return whether the response follows the protocol, and has an answer. For `texts`, see `answer_of`."""


class AgentProtocol(ABC):
    """The tokens of a conversation between the policy and its tools.

    Args:
        template: renders the prompts.
        tools: names of the tools that the policy may call.
    """

    format: ResponseFormat
    stop_strings: tuple[str, ...] = ()
    """Texts that end a turn."""
    max_scaffold_tokens: int
    """The largest number of tokens that `scaffold` returns."""

    def __init__(self, template: PromptTemplate, *, tools: Sequence[str]):
        self.template = template
        self.tools = tuple(tools)
        self.stop_tokens: tuple[int, ...] = () if template.end_of_turn is None else (template.end_of_turn,)
        """Ids of the tokens that end a turn, in addition to the end-of-sequence token."""

    @property
    def warning(self) -> str | None:
        """A warning for the user about the chat template, in one line, or None."""
        return None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.template.tokenizer

    @abstractmethod
    def parse(self, text: str, *, finish_reason: str, stop_string: str | None) -> ParsedTurn:
        """Return the calls in a turn's `text`, or the reason why the trajectory ends. No text raises an error.

        Args:
            finish_reason: "length" if the turn used up its tokens, else "stop".
            stop_string: the stop string that ended the turn, or None if none did.
        """

    @abstractmethod
    def min_observation_tokens(self, num_calls: int) -> int:
        """Return the smallest number of tokens of an observation after a turn with `num_calls` calls."""

    @abstractmethod
    def observe(self, results: Sequence[CallResult], *, room: int) -> Observation:
        """Return the results of a turn's calls, in the order of the calls, in at most `room` tokens.

        The observation has the protocol's control tokens and no others, whatever the results contain.

        Args:
            room: number of tokens, at least `min_observation_tokens`.
        """

    @abstractmethod
    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text that the policy wrote in a turn, without the tokens that only end the turn."""

    @abstractmethod
    def scaffold(self, trajectory: Trajectory, num_turns: int) -> list[int]:
        """Return the tokens between a context and the gold answer.

        The policy would begin an answer with these tokens. The context is the prompt and `num_turns` turns.
        """

    @abstractmethod
    def demonstrate(self, demonstration: Demonstration, *, prompt_index: int) -> Trajectory:
        """Return the trajectory that a rollout would record for `demonstration`, with log-probs of 0.

        Raises:
            ConfigError: with a one-line message, if the demonstration cannot be written in this protocol.
        """
