"""The records of prompts, turns and trajectories that pass through a training step.

The loss is computed on exactly the token ids that the engine sampled. No text is decoded and encoded again. Tokens
and log-probs are arrays with 4 bytes per element. A list of Python numbers would need about 36 bytes per element.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

Record = TypeVar("Record")
_OLD_FIELD = b"\xa5query"
"""The field name `query` in msgpack. Only turns that earlier versions wrote have this field."""


class TokenIds(array):
    """An array of token ids, int32."""

    __slots__ = ()

    def __new__(cls, values: Iterable[int] = ()) -> TokenIds:
        return super().__new__(cls, "i", values)  # type: ignore[return-value]  # typeshed lacks subclasses


class LogProbs(array):
    """An array of log-probs in nats, float32."""

    __slots__ = ()

    def __new__(cls, values: Iterable[float] = ()) -> LogProbs:
        return super().__new__(cls, "f", values)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question of a step, rendered with the chat template and tokenised."""

    index: int
    """Position of the prompt in the step's list of prompts, equal on all ranks. Identifies the prompt's group."""
    id: str
    """The question's id in its data set."""
    question: str
    answers: tuple[str, ...]
    """The gold answer and its aliases. Empty if the question has none (see `load_questions`)."""
    tokens: tuple[int, ...]
    """Token ids of the rendered prompt, including the header that precedes the policy's text."""
    hops: int = 0
    """Number of searches that the question needs. 0 if unknown. Used in reports and `LiveTrajectory.start_order`."""
    record: str = "{}"
    """The question's whole record in its file, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool call that the policy wrote."""

    tool: str
    """Name of the tool, as the policy wrote it."""
    arguments: str
    """The text that the tool gets: a query, or the JSON of several arguments."""
    problem: str | None = None
    """The error text that the policy reads if the call is wrong, else None. A wrong call is not passed to a tool."""
    problem_kind: str = ""
    """Kind of the problem: "malformed", "unknown_tool" or "excess". Empty if there is no problem."""
    failed: bool = False
    """Whether the tool failed to answer. The observation of a failed call reports the failure."""


@dataclass(kw_only=True)
class Turn:
    """A text that the policy wrote, and the observation that follows it."""

    tokens: TokenIds
    """Sampled token ids, including the ids of the stop string."""
    rollout_logprobs: LogProbs
    """The engine's log-prob of each token in `tokens`, in nats."""
    observation_tokens: TokenIds = field(default_factory=TokenIds)
    """Token ids of the observation. Empty for the final turn. The policy is never trained on these tokens."""
    calls: list[Call] = field(default_factory=list)
    """The calls of a process turn, in the order in which the policy wrote them. Empty for the final turn."""
    answer_prob: float | None = None
    """P_t, the length-normalised probability of the gold answer after this turn's observation."""
    info_gain: float | None = None
    """The information gain P_t - P_{t-1}, or log P_t - log P_{t-1}. None for a final turn, or if a probability is
    missing."""
    score: float | None = None
    """How much a process turn raised the chance of success, according to a reward or a tool. None if unknown."""
    version: int = 0
    """Version of the weights that sampled this turn. Version N is the result of N training steps."""
    experts: bytes = b""
    """Experts that the engine chose (`batch.expert_rows`), if `rollout.router_replay` is on. The rows of this turn
    and of all turns before it, end to end, belong to positions 0, 1, ... of the trajectory, up to this turn's last
    token but one."""

    def __post_init__(self) -> None:
        self.tokens = _as(TokenIds, self.tokens)
        self.rollout_logprobs = _as(LogProbs, self.rollout_logprobs)
        self.observation_tokens = _as(TokenIds, self.observation_tokens)

    @property
    def is_process(self) -> bool:
        """Whether the turn ended with tool calls and received an observation."""
        return bool(self.calls)

    def worth(self, turn_signal: str) -> float | None:
        """Return the information gain or the score, depending on `turn_signal` (`algorithm.turn_signal`)."""
        return {"gain": self.info_gain, "scores": self.score}[turn_signal]

    @property
    def query(self) -> str | None:
        """Arguments of the first call, or None for the final turn."""
        return self.calls[0].arguments if self.calls else None

    @property
    def tool(self) -> str | None:
        """Name of the tool that the first call named, or None for the final turn."""
        return self.calls[0].tool if self.calls else None

    @property
    def entropy(self) -> float:
        """Mean of -log p over the sampled tokens, in nats: an estimate of the policy's entropy per token."""
        return -sum(self.rollout_logprobs) / max(len(self.rollout_logprobs), 1)

    @property
    def tool_failed(self) -> bool:
        """Whether the turn has calls, and all of them failed."""
        return self.is_process and all(call.failed for call in self.calls)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """The place at which a trajectory branched off from another trajectory of its group (`rollout.tree`,
    `rollout.inner_branches`)."""

    parent: int
    """Sample index of the trajectory from which it branched off."""
    root: int
    """Sample index of the trajectory from which the tree grew. A trajectory without a `Branch` is a root."""
    owners: tuple[int, ...]
    """For each turn that the branch shares with its parent, the sample index of the trajectory that played the
    turn."""
    num_tokens: int = 0
    """Number of tokens of its parent's next turn that the branch also shares. Above 0 for an inner branch."""

    @property
    def is_inner(self) -> bool:
        """Whether the branch begins inside a turn."""
        return self.num_tokens > 0


@dataclass(kw_only=True)
class Trajectory:
    """One trajectory of a prompt: process turns, and a final turn if the trajectory was not cut short."""

    prompt_index: int
    prompt_id: str
    sample_index: int
    """Index of the trajectory in its group, 0 to group_size - 1. The inner branches of the group continue the
    numbering."""
    prompt_tokens: TokenIds
    turns: list[Turn]
    stop_reason: str
    """Why the trajectory ended: "answer", "eos", "length", "max_turns", "empty_query" or "context" (see
    `rollout.multi_turn`). "" until it ends."""
    baseline_prob: float | None = None
    """P_0, the length-normalised probability of the gold answer directly after the prompt."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Value of each reward and of its parts, by name. The format gate does not change these values."""
    task_reward: float = 0.0
    """The reward before a length penalty: the weighted sum of the rewards, or the reward of a wrong format."""
    outcome_reward: float = 0.0
    """`task_reward` with the length penalty."""
    reward_error: str | None = None
    """Why a reward could not judge the trajectory, in one line. If this is set, the step does not train on it."""
    exact_match: float = 0.0
    """Exact match of the extracted answer, even if the response's format is wrong."""
    format_ok: bool = False
    hops: int = 0
    branch: Branch | None = None
    """Where the trajectory branched off from another one. None if it was played from the prompt. `turns` begins with
    copies of the shared turns."""
    inner_branches: list[Trajectory] = field(default_factory=list)
    """The branches that begin inside turns of this trajectory. No step trains on them. They show how good the turns'
    beginnings are."""

    def __post_init__(self) -> None:
        self.prompt_tokens = _as(TokenIds, self.prompt_tokens)

    @property
    def process_turns(self) -> list[Turn]:
        """The turns that ended with a tool call and received an observation."""
        return [turn for turn in self.turns if turn.is_process]

    @property
    def num_process_turns(self) -> int:
        """The number of process turns, n_i."""
        return len(self.process_turns)

    @property
    def root(self) -> int:
        """Sample index of the trajectory from which this trajectory's tree grew."""
        return self.sample_index if self.branch is None else self.branch.root

    @property
    def owners(self) -> list[int]:
        """For each turn, the sample index of the trajectory that played the turn."""
        shared = () if self.branch is None else self.branch.owners
        return [*shared, *[self.sample_index] * (len(self.turns) - len(shared))]

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(turn.tokens) for turn in self.turns)

    @property
    def num_shared_tokens(self) -> int:
        """Number of sampled tokens that a branch shares with its parent."""
        if self.branch is None:
            return 0
        turns = self.turns[: len(self.branch.owners)]
        return sum(len(turn.tokens) for turn in turns) + self.branch.num_tokens

    @property
    def played(self) -> list[Trajectory]:
        """The trajectory and its inner branches."""
        return [self, *self.inner_branches]

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence: prompt, sampled tokens and observations."""
        return len(self.prompt_tokens) + sum(
            len(turn.tokens) + len(turn.observation_tokens) for turn in self.turns
        )

    @property
    def tokens(self) -> TokenIds:
        """The token ids of the whole sequence, as a new array."""
        sequence = TokenIds(self.prompt_tokens)
        for turn in self.turns:
            sequence.extend(turn.tokens)
            sequence.extend(turn.observation_tokens)
        return sequence

    @property
    def context_lengths(self) -> list[int]:
        """Number of tokens in each context c_0 .. c_n. c_0 is the prompt. c_t ends with the observation of turn t."""
        lengths = [len(self.prompt_tokens)]
        for turn in self.process_turns:
            lengths.append(lengths[-1] + len(turn.tokens) + len(turn.observation_tokens))
        return lengths

    @property
    def context_probs(self) -> list[float | None]:
        """P_0 .. P_n, the gold answer's probability after each context."""
        return [self.baseline_prob, *(turn.answer_prob for turn in self.process_turns)]

    @property
    def experts(self) -> bytes:
        """The rows of experts of all turns, end to end. Empty if the engine returned none."""
        return b"".join(turn.experts for turn in self.turns)

    def renumbered(self, prompt_index: int) -> Trajectory:
        """Return a copy with another `prompt_index`, which its inner branches get too."""
        inner = [one.renumbered(prompt_index) for one in self.inner_branches]
        return replace(self, prompt_index=prompt_index, inner_branches=inner)

    def staleness(self, version: int) -> int:
        """Return `version` minus the oldest version among the turns."""
        return max(version - turn.version for turn in self.turns)

    def to_dict(self) -> dict:
        """Return the fields as a dict. Turns, calls and branches become dicts, and arrays become lists.

        A turn also has `query`, `tool` and `tool_failed`, but not `experts`.
        """
        branch = None if self.branch is None else {**vars(self.branch), "owners": list(self.branch.owners)}
        turns = [_plain_turn(turn) for turn in self.turns]
        inner = [one.to_dict() for one in self.inner_branches]
        return {**_plain(vars(self)), "turns": turns, "branch": branch, "inner_branches": inner}


def encode_records(records: object) -> bytes:
    """Encode dataclasses, msgspec structs or lists of them as msgpack. Arrays become raw bytes."""
    return msgspec.msgpack.encode(records, enc_hook=array.tobytes)


def decode_records(content: bytes, kind: type[Record]) -> Record:
    """Return the object of type `kind` that `encode_records` encoded.

    Raises:
        msgspec.DecodeError: if `content` does not encode an object of type `kind`.
    """
    # Earlier versions wrote arrays as lists, and a turn's only call as three fields of the turn.
    if _OLD_FIELD in content:
        return msgspec.convert(_with_calls(msgspec.msgpack.decode(content)), kind, dec_hook=_array_of)
    return msgspec.msgpack.decode(content, type=kind, dec_hook=_array_of)


def from_dict(record: dict) -> Trajectory:
    """Convert `record`, a result of `Trajectory.to_dict`, back to a trajectory. Unknown keys are ignored.

    Raises:
        msgspec.ValidationError: if a field is missing or has the wrong type.
    """
    return msgspec.convert(_with_calls(record), Trajectory, dec_hook=_array_of)


def _with_calls(content: Any) -> Any:
    """Return the decoded `content`. Turns that earlier versions wrote get the field `calls`."""
    if isinstance(content, list | tuple):
        return [_with_calls(item) if isinstance(item, dict | list) else item for item in content]
    if not isinstance(content, dict):
        return content
    found = {name: _with_calls(value) for name, value in content.items()}
    if "query" in found and "rollout_logprobs" in found and "calls" not in found:
        query, tool, failed = found["query"], found.get("tool"), found.get("tool_failed", False)
        call = {"tool": tool or "search", "arguments": query, "failed": failed}
        found["calls"] = [] if query is None else [call]
    return found


def _array_of(kind: type, content: Any) -> array:
    """Return raw bytes or a list as an array of type `kind`."""
    if isinstance(content, bytes):
        values = kind()
        values.frombytes(content)
        return values
    try:
        return kind(content)
    except OverflowError as error:  # msgspec reports only ValueError and TypeError as invalid content
        raise ValueError(str(error)) from None


def _as(kind: type, values: Any) -> Any:
    return values if isinstance(values, kind) else kind(values)


def _plain_turn(turn: Turn) -> dict[str, Any]:
    calls = [dict(vars(call)) for call in turn.calls]
    first = {"query": turn.query, "tool": turn.tool, "tool_failed": turn.tool_failed}
    fields = {name: value for name, value in _plain(vars(turn)).items() if name != "experts"}
    return {**fields, "calls": calls, **first}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, array) else value for name, value in values.items()}
