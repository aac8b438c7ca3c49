"""The outcome reward of a response: exact match if its format is right, else -1 (Eq. 13-15)."""

from collections.abc import Sequence
from dataclasses import dataclass

from a2tgpo.protocol.tag_format import SEARCH_ONLY, extract_answer, is_well_formed
from a2tgpo.reward.answer_match import exact_match, f1_score

BAD_FORMAT_REWARD = -1.0


@dataclass(frozen=True, kw_only=True)
class OutcomeScore:
    """Reward, EM and F1 of one response."""

    reward: float
    """EM if the format is right, else -1."""
    exact_match: float
    """EM of the extracted answer, whether or not the format is right. 0.0 if no answer can be extracted."""
    f1: float
    format_ok: bool
    answer: str | None
    """Text in the last box of the last answer, or None if the response has no such box."""


def score_response(
    response: str, golds: Sequence[str], *, tools: tuple[str, ...] = SEARCH_ONLY
) -> OutcomeScore:
    """Return reward, EM and F1 of a whole response in tags (all turns, `<result>` blocks included)."""
    return score_answer(extract_answer(response), golds, format_ok=is_well_formed(response, tools=tools))


def score_answer(answer: str | None, golds: Sequence[str], *, format_ok: bool) -> OutcomeScore:
    """Return reward, EM and F1 of an answer. `format_ok` says whether the format of the response is right."""
    match = 0.0 if answer is None else exact_match(answer, golds)
    return OutcomeScore(
        reward=match if format_ok else BAD_FORMAT_REWARD,
        exact_match=match,
        f1=0.0 if answer is None else f1_score(answer, golds),
        format_ok=format_ok,
        answer=answer,
    )
