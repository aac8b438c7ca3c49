"""The tags around the policy's thoughts."""

import re

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
THINK_TAG = re.compile(r"</?think>")


def after_thought(text: str, *, before: bool = False) -> str:
    """Return the part of `text` after its last thought, or an empty text if a thought is open at its end.

    Args:
        before: whether a thought was open before `text`.
    """
    return "" if thought_is_open(text, before=before) else text.rpartition(THINK_CLOSE)[2]


def thought_is_open(text: str, *, before: bool = False) -> bool:
    """Return whether the last think tag in `text` is <think>. If `text` has no think tag, return `before`."""
    tags = THINK_TAG.findall(text)
    return tags[-1] == THINK_OPEN if tags else before
