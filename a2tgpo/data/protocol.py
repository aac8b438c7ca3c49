"""The tags of a rollout's text, which only the policy and the rollout may write."""

from __future__ import annotations

import re
from collections.abc import Sequence

RESULT_OPEN, RESULT_CLOSE = " <result>\n", "\n</result>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
THINK_TAG = re.compile(r"</?think>")


def tag_pattern(tools: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches every tag of the protocol, including the tags that call `tools`."""
    return re.compile(rf"</?(?:{'|'.join(['think', 'result', 'answer', *map(re.escape, tools)])})>")


def without_tags(text: str, tags: re.Pattern[str]) -> str:
    """Return `text` without `tags`. If a removal forms a new tag, as in </res</result>ult>, remove that tag too."""
    while (stripped := tags.sub("", text)) != text:
        text = stripped
    return text


def thought_is_open(text: str, *, before: bool = False) -> bool:
    """Return whether a thought is open after `text`, so whether the last think tag in `text` is <think>.

    If `text` has no think tag, return `before`, which states whether a thought was open before `text`.
    """
    tags = THINK_TAG.findall(text)
    return tags[-1] == THINK_OPEN if tags else before
