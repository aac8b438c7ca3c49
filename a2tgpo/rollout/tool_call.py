"""What a search call is, and how its answer is written into the context.

Rules for the policy's text. A turn ends at the first `</search>`; the query is what stands between the last
`<search>` of that turn and it, with the protocol's own tags taken out and spaces squeezed. So
`<search> a <search> b </search>` asks for "b", and a `</search>` without an opening asks for nothing, which
ends the rollout like any empty query.
"""

import re
from collections.abc import Sequence

from a2tgpo.search.passage import Passage

SEARCH_OPEN, SEARCH_CLOSE = "<search>", "</search>"
ANSWER_CLOSE = "</answer>"
RESULT_OPEN, RESULT_CLOSE = " <result>\n", "\n</result>"
STOP_STRINGS = (SEARCH_CLOSE, ANSWER_CLOSE)
MAX_REASON_CHARS = 160

_TAG = re.compile(r"</?(?:think|search|result|answer)>")


def find_query(text: str) -> str:
    """The query of a turn's `text`, which ends with (or holds) `</search>`; empty if there is none."""
    before_close, _, _ = text.partition(SEARCH_CLOSE)
    _, opening, query = before_close.rpartition(SEARCH_OPEN)
    return " ".join(_TAG.sub(" ", query).split()) if opening else ""


def cut_at_stop(text: str) -> str:
    """`text` up to and with the first stop string; all of it if there is none."""
    ends = [text.find(stop) + len(stop) for stop in STOP_STRINGS if stop in text]
    return text[: min(ends)] if ends else text


def format_passage(rank: int, passage: Passage) -> str:
    """One passage as the policy reads it (Search-R1's form); `rank` counts from 1."""
    title = f"(Title: {passage.title}) " if passage.title else ""
    return f"Doc {rank} {title}{' '.join(passage.text.split())}"


def format_observation(passages: Sequence[str]) -> str:
    """The tool's answer as text: ` <result>`, one formatted passage a line, `</result>`.

    The protocol's own tags are taken out of the passages, so that retrieved text can neither close the
    result nor look like an answer.
    """
    body = "\n".join(_TAG.sub("", passage) for passage in passages) or "No passage was found."
    return f"{RESULT_OPEN}{body}{RESULT_CLOSE}"


def format_failure(reason: str) -> str:
    """The observation that states a failed search."""
    return format_observation([f"The search failed: {' '.join(reason.split())[:MAX_REASON_CHARS]}"])
