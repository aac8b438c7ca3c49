"""The outcome reward of an episode: the weighted sum of its rewards, and the gate for a wrong format (Eq. 13-15)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from a2tgpo.io.user_code import fault_line
from a2tgpo.reward.episode import Episode, RewardError, Score
from a2tgpo.reward.load import NamedReward

BAD_FORMAT_REWARD = -1.0


class RewardFaultError(RuntimeError):
    """A reward has a bug or hangs too often. The message is one line."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome reward of an episode."""

    total: float = 0.0
    """The reward before a length penalty."""
    rewards: dict[str, float] = field(default_factory=dict)
    """The value of each reward by its label, and each part of a reward by LABEL.PART. The format gate does not change
    these values."""
    turn_scores: tuple[float | None, ...] | None = None
    """The score of each turn with tool calls, or None if no reward with a weight other than 0 returns turn scores."""
    error: str | None = None
    """Why a reward could not judge the episode, in one line. None if all rewards judged the episode."""


def judge(rewards: Sequence[NamedReward], episode: Episode, *, format_gate: bool) -> Verdict:
    """Call all rewards, and return their verdict.

    Args:
        format_gate: value of `reward.format_gate`.

    Raises:
        RewardFaultError: a reward raised an exception other than `RewardError`, or returned an invalid value.
    """
    values: dict[str, float] = {}
    turn_scores: tuple[float | None, ...] | None = None
    total = 0.0
    for named in rewards:
        question = f"(question {episode.question_id!r:.60})"
        try:
            returned = named.reward.score(episode)
        except RewardError as error:
            return Verdict(error=f"{named.label}: {' '.join(str(error).split())}")
        except Exception as error:
            raise RewardFaultError(f"reward {fault_line(error, named.path)} {question}") from None
        try:
            score = _checked(returned, episode)
        except ValueError as error:
            raise RewardFaultError(f"reward {named.path.name} {named.label}: {error} {question}") from None
        except Exception:  # for example, `parts` is not a mapping
            shown = f"{returned!r:.80}"
            raise RewardFaultError(
                f"reward {named.path.name} {named.label}: it returned {shown}, not a finite number or a Score with "
                f"such parts and turn_scores {question}"
            ) from None
        values[named.label] = score.value
        values |= {f"{named.label}.{name}": value for name, value in score.parts.items()}
        total += named.weight * score.value
        if named.weight != 0:
            turn_scores = _added(turn_scores, score.turn_scores, weight=named.weight)
    if format_gate and not episode.format_ok:
        total = BAD_FORMAT_REWARD
    return Verdict(total=total, rewards=values, turn_scores=turn_scores)


def _checked(returned: object, episode: Episode) -> Score:
    """Convert a reward's return value to a `Score` of floats. Raise ValueError if the value is invalid."""
    score = returned if isinstance(returned, Score) else Score(value=returned)  # type: ignore[arg-type]
    value, parts = _number(score.value), {str(name): _number(part) for name, part in score.parts.items()}
    turn_scores = score.turn_scores
    if turn_scores is not None:
        num_turns = sum(bool(turn.calls) for turn in episode.turns)
        if len(turn_scores) != num_turns:
            raise ValueError(
                f"it returned {len(turn_scores)} turn_scores for {num_turns} turns with tool calls"
            )
        turn_scores = tuple(None if part is None else _number(part) for part in turn_scores)
    return Score(value=value, parts=parts, turn_scores=turn_scores)


def _number(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # also a bool, a number of NumPy, or a tensor of one element
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        raise ValueError(f"it returned {value!r:.80}, not a finite number or a Score")
    return number


def _added(
    sums: tuple[float | None, ...] | None, scores: Sequence[float | None] | None, *, weight: float
) -> tuple[float | None, ...] | None:
    """Add one reward's weighted turn scores to `sums`, those of earlier rewards, and return the new sums."""
    if scores is None:
        return sums
    own = tuple(None if score is None else weight * score for score in scores)
    if sums is None:
        return own
    return tuple(a if b is None else b if a is None else a + b for a, b in zip(sums, own, strict=True))
