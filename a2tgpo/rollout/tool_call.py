"""What a tool call is, and how its answer is written into the context.

Rules for the policy's text. A turn ends at the first `</NAME>` of a tool; what is asked stands between the last
`<NAME>` of that turn and it, with the protocol's own tags taken out and spaces squeezed. So
`<search> a <search> b </search>` asks for "b", and a `</search>` without an opening asks for nothing, which
ends the rollout like any empty query.
"""

from collections.abc import Sequence

from a2tgpo.data.protocol import RESULT_CLOSE, RESULT_OPEN, tag_pattern, without_tags

ANSWER_CLOSE = "</answer>"
MAX_REASON_CHARS = 160


class CallSyntax:
    """The tags of a set of tools.

    Args:
        names: of the tools; each is called as <NAME> text </NAME>.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._by_closing = {f"</{name}>": name for name in names}
        self.stop_strings = (*self._by_closing, ANSWER_CLOSE)
        self._tag = tag_pattern(names)

    def tool_of(self, stop_string: str | None) -> str | None:
        """The tool whose call ends with this; None if it ends no call."""
        return self._by_closing.get(stop_string) if stop_string is not None else None

    def find_query(self, text: str, name: str) -> str:
        """What a turn's `text`, which ends with (or holds) `</NAME>`, asks the tool; empty if nothing."""
        before_close, _, _ = text.partition(f"</{name}>")
        _, opening, query = before_close.rpartition(f"<{name}>")
        return " ".join(self._tag.sub(" ", query).split()) if opening else ""

    def cut_at_stop(self, text: str) -> str:
        """`text` up to and with the first stop string; all of it if there is none."""
        ends = [text.find(stop) + len(stop) for stop in self.stop_strings if stop in text]
        return text[: min(ends)] if ends else text

    def format_result(self, parts: Sequence[str]) -> str:
        """A tool's answer as text: ` <result>`, one part a line, `</result>`."""
        return f"{RESULT_OPEN}{self.result_body(parts)}{RESULT_CLOSE}"

    def result_body(self, parts: Sequence[str]) -> str:
        """What stands between the result's tags.

        The protocol's own tags are taken out of the parts, so that what a tool says can neither close the result
        nor look like a call or an answer.
        """
        return "\n".join(without_tags(part, self._tag) for part in parts)

    def failure_body(self, name: str, reason: str) -> str:
        """What stands between the result's tags after a failed call."""
        return self.result_body([f"The {name} failed: {' '.join(reason.split())[:MAX_REASON_CHARS]}"])


SEARCH_CALLS = CallSyntax(("search",))
"""Of the search tool alone, which the demonstrations of the examples use."""
