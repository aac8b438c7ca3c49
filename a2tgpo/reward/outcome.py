"""The outcome reward: exact match, if the format is right (Eq. 13-15)."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from a2tgpo.data.protocol import THINK_TAG
from a2tgpo.reward.answer_match import exact_match, f1_score

BAD_FORMAT_REWARD = -1.0
SEARCH_ONLY = ("search",)
"""The tools of the paper's experiments."""
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_TAG = re.compile(r"</?answer>")


@dataclass(frozen=True, kw_only=True)
class OutcomeScore:
    """Reward, EM and F1 of one response."""

    reward: float
    """EM if the format is right, else -1."""
    exact_match: float
    """EM of the extracted answer, whether or not the format is right; 0.0 if none can be extracted."""
    f1: float
    format_ok: bool
    answer: str | None
    """Text inside the last box of the last answer; None if there is none."""


def judged_text(turns: Sequence[tuple[str, bool]], *, opening_tags: str | None = "") -> str:
    """Return the text whose format is judged: the policy's text, with every observation emptied.

    Retrieved passages may contain tags, which must not affect the policy's reward.

    Args:
        turns: the decoded text of each turn, and whether it got an observation.
        opening_tags: <think> and </think> at the end of the prompt, which belong to the response; None: unknown, so a
            response that first closes a thought is assumed to have it opened by the prompt.
    """
    text = "".join(text + (" <result></result>" if answered else "") for text, answered in turns)
    if opening_tags is None:
        opening_tags = "<think>" if THINK_TAG.findall(text)[:1] == ["</think>"] else ""
    return opening_tags + text


def score_response(
    response: str, golds: Sequence[str], *, tools: tuple[str, ...] = SEARCH_ONLY
) -> OutcomeScore:
    """Return reward, EM and F1 of a whole response (all turns, `<result>` blocks included).

    Args:
        tools: names of the tools, which are also the tags of their calls.
    """
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
    r"""Check for balanced thoughts, exactly one answer with a `\boxed{...}`, and one result per tool call."""
    return (
        _is_balanced(THINK_TAG.findall(response), "<think>")
        and _ANSWER_TAG.findall(response) == ["<answer>", "</answer>"]
        and _calls_are_answered(_tool_tag(tools).findall(response), tools)
        and all("\\boxed{" in block and "}" in block for block in _ANSWER.findall(response))
        and extract_answer(response) is not None
    )


def extract_answer(response: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` inside the last `<answer>` block; None if there is none.

    A `\boxed` followed by a space boxes the rest of the block up to a `$`, as in the authors' code, which follows the
    code of the MATH data set.
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
    """Check that the tags form complete exchanges: <NAME> </NAME> <result> </result>, repeated."""
    exchanges = {(f"<{name}>", f"</{name}>", "<result>", "</result>") for name in tools}
    return len(tags) % 4 == 0 and all(tuple(tags[i : i + 4]) in exchanges for i in range(0, len(tags), 4))


@functools.cache
def _tool_tag(tools: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"</?(?:{'|'.join(map(re.escape, (*tools, 'result')))})>")
