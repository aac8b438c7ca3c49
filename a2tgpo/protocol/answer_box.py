r"""Find an answer in `\boxed{...}`."""

from __future__ import annotations


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` in `text`, or None if there is none.

    If a space follows `\boxed`, the content is the rest of `text` up to the first `$`. The authors' code follows the
    same rule.
    """
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
