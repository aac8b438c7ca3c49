"""The syntax of a tool call, and of the tool's answer in the context.

A turn ends at the first `</NAME>` of a tool. The query is the text between the turn's last `<NAME>` and this tag,
without the protocol's own tags and with runs of whitespace reduced to one space. So `<search> a <search> b </search>`
has the query "b". A `</search>` without an opening tag has an empty query, which ends the trajectory.
"""

from collections.abc import Sequence

from a2tgpo.data.protocol import RESULT_CLOSE, RESULT_OPEN, tag_pattern, without_tags

ANSWER_CLOSE = "</answer>"
MAX_REASON_CHARS = 160


class CallSyntax:
    """The tags of a set of tools.

    Args:
        names: names of the tools; the policy calls each as <NAME> text </NAME>.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._by_closing = {f"</{name}>": name for name in names}
        self.stop_strings = (*self._by_closing, ANSWER_CLOSE)
        self._tag = tag_pattern(names)

    def tool_of(self, stop_string: str | None) -> str | None:
        """Return the tool whose call ends with `stop_string`; None if it ends no call."""
        return self._by_closing.get(stop_string) if stop_string is not None else None

    def find_query(self, text: str, name: str) -> str:
        """Return the query in a turn's `text`, which ends with (or contains) `</NAME>`; empty if there is none."""
        before_close, _, _ = text.partition(f"</{name}>")
        _, opening, query = before_close.rpartition(f"<{name}>")
        return " ".join(self._tag.sub(" ", query).split()) if opening else ""

    def cut_at_stop(self, text: str) -> str:
        """Return `text` up to and including the first stop string; all of it if there is none."""
        ends = [text.find(stop) + len(stop) for stop in self.stop_strings if stop in text]
        return text[: min(ends)] if ends else text

    def format_result(self, parts: Sequence[str]) -> str:
        """Return a tool's answer as text: ` <result>`, one part per line, `</result>`."""
        return f"{RESULT_OPEN}{self.result_body(parts)}{RESULT_CLOSE}"

    def result_body(self, parts: Sequence[str]) -> str:
        """Return the text between the result's tags.

        The protocol's own tags are removed from the parts, so that a tool's answer can neither close the result nor
        look like a call or an answer.
        """
        return "\n".join(without_tags(part, self._tag) for part in parts)

    def failure_body(self, name: str, reason: str) -> str:
        """Return the text between the result's tags after a failed call."""
        return self.result_body([f"The {name} failed: {' '.join(reason.split())[:MAX_REASON_CHARS]}"])


SEARCH_CALLS = CallSyntax(("search",))
"""Syntax of the search tool alone, used by the demonstrations of the examples."""
