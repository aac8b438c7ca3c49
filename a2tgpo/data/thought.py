"""The tags around the policy's thoughts."""

import re

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
THINK_TAG = re.compile(r"</?think>")


def thought_is_open(text: str, *, before: bool = False) -> bool:
    """Return whether the last think tag in `text` is <think>; if `text` has no think tag, return `before`."""
    tags = THINK_TAG.findall(text)
    return tags[-1] == THINK_OPEN if tags else before
