"""The format of a response in tags, and the answer in it (Eq. 13-15)."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from a2tgpo.data.thought import THINK_TAG
from a2tgpo.protocol.answer_box import last_box
from a2tgpo.trajectory import Trajectory

SEARCH_ONLY = ("search",)
"""Names of the tools in the paper's experiments."""
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_TAG = re.compile(r"</?answer>")


@dataclass(frozen=True, kw_only=True)
class TagFormat:
    """Finds the answer in a response, and judges the format of the policy's own text (see `ResponseFormat`)."""

    tools: tuple[str, ...] = SEARCH_ONLY
    """Names of the tools that the policy may call. They are also the tags of the calls."""
    opening_tags: str | None = None
    """The think tags at the end of the prompt (`PromptTemplate.opening_tags`), or None if they are unknown (see
    `judged_text`)."""

    def answer_of(self, trajectory: Trajectory, texts: Sequence[str]) -> str | None:
        return extract_answer(self._response(trajectory, texts))

    def is_well_formed(self, trajectory: Trajectory, texts: Sequence[str]) -> bool:
        return is_well_formed(self._response(trajectory, texts), tools=self.tools)

    def _response(self, trajectory: Trajectory, texts: Sequence[str]) -> str:
        answered = [turn.is_process for turn in trajectory.turns]
        return judged_text(list(zip(texts, answered, strict=True)), opening_tags=self.opening_tags)


def judged_text(turns: Sequence[tuple[str, bool]], *, opening_tags: str | None = "") -> str:
    """Return the text whose format is judged: the policy's text, with an empty result block for each observation.

    Observations are left out, because tags in retrieved passages must not affect the policy's reward.

    Args:
        turns: for each turn, its decoded text and whether an observation followed it.
        opening_tags: the think tags at the end of the prompt, which are treated as part of the response. None means
            that the tags are unknown. Then <think> is added if the first think tag of the response is </think>.
    """
    text = "".join(text + (" <result></result>" if answered else "") for text, answered in turns)
    if opening_tags is None:
        opening_tags = "<think>" if THINK_TAG.findall(text)[:1] == ["</think>"] else ""
    return opening_tags + text


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
    return last_box(blocks[-1]) if blocks else None


def _is_balanced(tags: list[str], opening: str) -> bool:
    depth = 0
    for tag in tags:
        depth += 1 if tag == opening else -1
        if depth < 0:
            return False
    return bool(tags) and depth == 0


def _calls_are_answered(tags: list[str], tools: tuple[str, ...]) -> bool:
    """Return whether the tags form a sequence of complete exchanges of the form <NAME> </NAME> <result> </result>."""
    exchanges = {(f"<{name}>", f"</{name}>", "<result>", "</result>") for name in tools}
    return len(tags) % 4 == 0 and all(tuple(tags[i : i + 4]) in exchanges for i in range(0, len(tags), 4))


@functools.cache
def _tool_tag(tools: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"</?(?:{'|'.join(map(re.escape, (*tools, 'result')))})>")
