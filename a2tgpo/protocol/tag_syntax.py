"""The syntax of tool calls and of tools' answers.

A turn ends at the first `</NAME>` of a tool. The query is the text between this tag and the last `<NAME>` before it.
For example, `<search> a <search> b </search>` has the query "b". The protocol's tags are removed from the query.
Unless the tool takes several lines, spaces and line breaks become single spaces. If the opening tag is missing, the
query is empty, and the trajectory ends.
"""

import re
import textwrap
from collections.abc import Sequence

RESULT_OPEN, RESULT_CLOSE = " <result>\n", "\n</result>"
ANSWER_CLOSE = "</answer>"
MAX_REASON_CHARS = 160
_RESULT = re.compile(r"(\s*<result>\s*)?(.*?)(\s*</result>\s*)?", re.DOTALL)


def tag_pattern(tools: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches every tag of the protocol, including the tags that call `tools`."""
    return re.compile(rf"</?(?:{'|'.join(['think', 'result', 'answer', *map(re.escape, tools)])})>")


def split_result(observation: str) -> tuple[str, str, str]:
    """Split an observation into the opening tag, the tool's answer and the closing tag.

    The spaces around a tag are returned with the tag, because a tokenizer may encode tag and spaces as one token.
    """
    found = _RESULT.fullmatch(observation)
    assert found is not None, "the pattern matches every text"
    before, body, after = found.groups(default="")
    return before, body, after


def without_tags(text: str, tags: re.Pattern[str]) -> str:
    """Return `text` without `tags`. If a removal forms a new tag, as in </res</result>ult>, remove that tag too."""
    while (stripped := tags.sub("", text)) != text:
        text = stripped
    return text


class CallSyntax:
    """The tags that call a set of tools. To call the tool NAME, the policy writes <NAME> text </NAME>.

    Args:
        multiline: names of the tools whose queries keep their line breaks and indents.
    """

    def __init__(self, names: Sequence[str], *, multiline: Sequence[str] = ()):
        self.names = tuple(names)
        self._multiline = frozenset(multiline)
        self._by_closing = {f"</{name}>": name for name in names}
        self.stop_strings = (*self._by_closing, ANSWER_CLOSE)
        self._tag = tag_pattern(names)

    def tool_of(self, stop_string: str | None) -> str | None:
        """Return the name of the tool whose call ends with `stop_string`, or None if no call ends with it."""
        return self._by_closing.get(stop_string) if stop_string is not None else None

    def find_query(self, text: str, name: str) -> str:
        """Return the query of a turn's `text`, which contains `</NAME>`, or an empty text if it has no query."""
        before_close, _, _ = text.partition(f"</{name}>")
        _, opening, query = before_close.rpartition(f"<{name}>")
        if not opening:
            return ""
        untagged = self._tag.sub(" ", query)
        return _lines(untagged) if name in self._multiline else " ".join(untagged.split())

    def cut_at_stop(self, text: str) -> str:
        """Return `text` up to the end of its first stop string, or all of `text` if it has none."""
        ends = [text.find(stop) + len(stop) for stop in self.stop_strings if stop in text]
        return text[: min(ends)] if ends else text

    def format_result(self, parts: Sequence[str]) -> str:
        """Return the answer of a tool as text: ` <result>`, then each part on its own line, then `</result>`."""
        return f"{RESULT_OPEN}{self.result_body(parts)}{RESULT_CLOSE}"

    def result_body(self, parts: Sequence[str]) -> str:
        """Return the text between the two tags of a result.

        The protocol's tags are removed from the parts, so a tool's answer cannot close the result.
        """
        return "\n".join(without_tags(part, self._tag) for part in parts)

    def failure_body(self, name: str, reason: str) -> str:
        """Return the text between the two tags of the result of a failed call."""
        return self.result_body([f"The {name} failed: {' '.join(reason.split())[:MAX_REASON_CHARS]}"])


def _lines(text: str) -> str:
    """Return the lines of `text`. Remove their common indent, unless text follows the opening tag on its line."""
    first, _, rest = text.partition("\n")
    return (
        f"{first.strip()}\n{rest}".rstrip() if first.strip() else textwrap.dedent(rest).strip("\n").rstrip()
    )


SEARCH_CALLS = CallSyntax(("search",))
"""The syntax if search is the only tool."""
