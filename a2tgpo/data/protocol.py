"""The tags of a rollout's text, which nobody but the policy and the rollout itself may write."""

from __future__ import annotations

import re
from collections.abc import Sequence

RESULT_OPEN, RESULT_CLOSE = " <result>\n", "\n</result>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
THINK_TAG = re.compile(r"</?think>")


def tag_pattern(tools: Sequence[str]) -> re.Pattern[str]:
    """Every tag of the protocol, those that call `tools` included."""
    return re.compile(rf"</?(?:{'|'.join(['think', 'result', 'answer', *map(re.escape, tools)])})>")


def without_tags(text: str, tags: re.Pattern[str]) -> str:
    """`text` without `tags`, also where taking one out brings another together, as in </res</result>ult>."""
    while (stripped := tags.sub("", text)) != text:
        text = stripped
    return text


def thought_is_open(text: str, *, before: bool = False) -> bool:
    """Whether a thought is open behind `text`: its last <think> or </think> decides; without one, `before`."""
    tags = THINK_TAG.findall(text)
    return tags[-1] == THINK_OPEN if tags else before
