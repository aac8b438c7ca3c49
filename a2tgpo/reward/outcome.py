"""The outcome reward of a response: exact match if its format is right, else -1 (Eq. 13-15)."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from a2tgpo.data.protocol import THINK_TAG
from a2tgpo.reward.answer_match import exact_match, f1_score

BAD_FORMAT_REWARD = -1.0
SEARCH_ONLY = ("search",)
"""Names of the tools in the paper's experiments."""
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_TAG = re.compile(r"</?answer>")


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


def judged_text(turns: Sequence[tuple[str, bool]], *, opening_tags: str | None = "") -> str:
    """Return the text whose format is judged: the policy's text, with an empty result block for each observation.

    Observations are left out, because tags in retrieved passages must not affect the policy's reward.

    Args:
        turns: for each turn, its decoded text and whether an observation followed it.
        opening_tags: the think tags at the end of the prompt, which count as part of the response. None means that
            the tags are unknown. Then <think> is added if the first think tag of the response is </think>.
    """
    text = "".join(text + (" <result></result>" if answered else "") for text, answered in turns)
    if opening_tags is None:
        opening_tags = "<think>" if THINK_TAG.findall(text)[:1] == ["</think>"] else ""
    return opening_tags + text


def score_response(
    response: str, golds: Sequence[str], *, tools: tuple[str, ...] = SEARCH_ONLY
) -> OutcomeScore:
    """Return reward, EM and F1 of a whole response (all turns, `<result>` blocks included)."""
    answer = extract_answer(response)
    format_ok = answer is not None and is_well_formed(response, tools=tools)
    match = 0.0 if answer is None else exact_match(answer, golds)
    return OutcomeScore(
        reward=match if format_ok else BAD_FORMAT_REWARD,
        exact_match=match,
        f1=0.0 if answer is None else f1_score(answer, golds),
        format_ok=format_ok,
        answer=answer,
    )


def is_well_formed(response: str, *, tools: tuple[str, ...] = SEARCH_ONLY) -> bool:
    r"""Return whether the format of the response is right.

    Think tags must be balanced, each tool call must have one result, and exactly one answer with a `\boxed{...}` must
    exist.
    """
    return (
        _is_balanced(THINK_TAG.findall(response), "<think>")
        and _ANSWER_TAG.findall(response) == ["<answer>", "</answer>"]
        and _calls_are_answered(_tool_tag(tools).findall(response), tools)
        and all("\\boxed{" in block and "}" in block for block in _ANSWER.findall(response))
        and extract_answer(response) is not None
    )


def extract_answer(response: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` inside the last `<answer>` block, or None if there is none.

    If a space follows `\boxed`, the content is the rest of the block up to the first `$`. The authors' code
    follows the same rule.
    """
    blocks = _ANSWER.findall(response)
    return _last_box(blocks[-1]) if blocks else None


def _last_box(text: str) -> str | None:
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def _is_balanced(tags: list[str], opening: str) -> bool:
    depth = 0
    for tag in tags:
        depth += 1 if tag == opening else -1
        if depth < 0:
            return False
    return bool(tags) and depth == 0


def _calls_are_answered(tags: list[str], tools: tuple[str, ...]) -> bool:
    """Return whether the tags form a sequence of complete exchanges, each <NAME> </NAME> <result> </result>."""
    exchanges = {(f"<{name}>", f"</{name}>", "<result>", "</result>") for name in tools}
    return len(tags) % 4 == 0 and all(tuple(tags[i : i + 4]) in exchanges for i in range(0, len(tags), 4))


@functools.cache
def _tool_tag(tools: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"</?(?:{'|'.join(map(re.escape, (*tools, 'result')))})>")
