"""The records that travel through a training step.

Token ids are authoritative: the loss sees exactly the ids that the engine sampled. Nothing is decoded and encoded
again, and no turn boundary is inferred from a mask or a value.

Tokens and log-probs are arrays with 4 bytes per element, in memory and between ranks; lists of Python numbers need
about 36. Other sequences are converted to arrays when a record is created.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

Record = TypeVar("Record")


class TokenIds(array):
    """Token ids, int32."""

    __slots__ = ()

    def __new__(cls, values: Iterable[int] = ()) -> TokenIds:
        return super().__new__(cls, "i", values)  # type: ignore[return-value]  # typeshed knows no subclass


class LogProbs(array):
    """Log-probs in nats, float32."""

    __slots__ = ()

    def __new__(cls, values: Iterable[float] = ()) -> LogProbs:
        return super().__new__(cls, "f", values)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question of a step, rendered and tokenised."""

    index: int
    """Position in the step's prompt list, equal on all ranks; identifies the group in all statistics."""
    id: str
    """The question's id in its data set."""
    question: str
    answers: tuple[str, ...]
    """Gold answer and its aliases; never empty."""
    tokens: tuple[int, ...]
    """The rendered prompt, generation header included."""
    hops: int = 0
    """Searches that the question needs, 0 if the data set does not say; for reporting only."""


@dataclass(kw_only=True)
class Turn:
    """The policy's text up to one stop, and the environment's observation."""

    tokens: TokenIds
    """Sampled ids, stop string included."""
    rollout_logprobs: LogProbs
    """log p of each sampled token by the engine, nats; same length as `tokens`."""
    observation_tokens: TokenIds = field(default_factory=TokenIds)
    """The observation, never trained on; empty for the final turn."""
    query: str | None = None
    """Text that a process turn sent to its tool; None for the final turn."""
    tool: str | None = None
    """The tool that a process turn called; None for the final turn."""
    tool_failed: bool = False
    """Whether the tool did not answer; the observation then reports the failure."""
    answer_prob: float | None = None
    """Length-normalised probability of the gold answer after this turn's observation (P_t)."""
    info_gain: float | None = None
    """ig_t = P_t - P_{t-1} (or its log form); None on a final turn and where it could not be computed."""
    version: int = 0
    """Version of the weights that sampled this turn: the number of steps they were trained for."""

    def __post_init__(self) -> None:
        self.tokens = _as(TokenIds, self.tokens)
        self.rollout_logprobs = _as(LogProbs, self.rollout_logprobs)
        self.observation_tokens = _as(TokenIds, self.observation_tokens)


@dataclass(kw_only=True)
class Trajectory:
    """One trajectory of a prompt: process turns, then (unless cut short) the turn that carries the answer."""

    prompt_index: int
    prompt_id: str
    sample_index: int
    """Number of the trajectory among those of its prompt, 0 to group_size - 1."""
    prompt_tokens: TokenIds
    turns: list[Turn]
    stop_reason: str
    """answer | eos | length | max_turns | empty_query | context, or "" while unfinished; see `rollout.multi_turn`."""
    baseline_prob: float | None = None
    """P_0, from the prompt alone."""
    outcome_reward: float = 0.0
    exact_match: float = 0.0
    """EM of the extracted answer, whether or not the format is right."""
    format_ok: bool = False
    hops: int = 0

    def __post_init__(self) -> None:
        self.prompt_tokens = _as(TokenIds, self.prompt_tokens)

    @property
    def process_turns(self) -> list[Turn]:
        """The turns that ended with a tool call and got an observation."""
        return [turn for turn in self.turns if turn.query is not None]

    @property
    def num_process_turns(self) -> int:
        """n_i, the number of `process_turns`."""
        return len(self.process_turns)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(turn.tokens) for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence: prompt, sampled tokens, observations."""
        return len(self.prompt_tokens) + sum(
            len(turn.tokens) + len(turn.observation_tokens) for turn in self.turns
        )

    @property
    def tokens(self) -> TokenIds:
        """The whole sequence, as a new array."""
        sequence = TokenIds(self.prompt_tokens)
        for turn in self.turns:
            sequence.extend(turn.tokens)
            sequence.extend(turn.observation_tokens)
        return sequence

    @property
    def context_lengths(self) -> list[int]:
        """Lengths of c_0 .. c_n: the prompt, and the sequence up to the observation of each process turn."""
        lengths = [len(self.prompt_tokens)]
        for turn in self.process_turns:
            lengths.append(lengths[-1] + len(turn.tokens) + len(turn.observation_tokens))
        return lengths

    @property
    def context_probs(self) -> list[float | None]:
        """P_0 .. P_n: the gold answer's probability in each context, by the engine."""
        return [self.baseline_prob, *(turn.answer_prob for turn in self.process_turns)]

    def staleness(self, version: int) -> int:
        """Return how many versions older than `version` the weights that sampled the oldest tokens are."""
        return max(version - turn.version for turn in self.turns)

    def to_dict(self) -> dict:
        """Convert all fields, turns included, with lists in place of arrays."""
        return {**_plain(vars(self)), "turns": [_plain(vars(turn)) for turn in self.turns]}


def encode_records(records: object) -> bytes:
    """Encode records (dataclasses, lists, msgspec structs) as msgpack, with arrays as raw bytes."""
    return msgspec.msgpack.encode(records, enc_hook=array.tobytes)


def decode_records(content: bytes, kind: type[Record]) -> Record:
    """Decode the output of `encode_records` as a `kind`; accept lists for arrays, as earlier versions wrote.

    Raises:
        msgspec.DecodeError: `content` is something else.
    """
    return msgspec.msgpack.decode(content, type=kind, dec_hook=_array_of)


def from_dict(record: dict) -> Trajectory:
    """Rebuild a trajectory from the output of `Trajectory.to_dict`; ignore other keys.

    Raises:
        msgspec.ValidationError: a field is missing or of another type.
    """
    return msgspec.convert(record, Trajectory, dec_hook=_array_of)


def _array_of(kind: type, content: Any) -> array:
    """Convert raw bytes or a list to an array; raise only what msgspec reports as invalid content."""
    if isinstance(content, bytes):
        values = kind()
        values.frombytes(content)
        return values
    try:
        return kind(content)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def _as(kind: type, values: Any) -> Any:
    return values if isinstance(values, kind) else kind(values)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, array) else value for name, value in values.items()}
