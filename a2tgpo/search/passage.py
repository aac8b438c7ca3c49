"""Passages, and their text in Search-R1's corpora and wire format."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        """The title in double quotes on the first line, and the text below it. Only the text if there is no title."""
        return f'"{self.title}"\n{self.text}' if self.title else self.text


def format_passage(rank: int, passage: Passage) -> str:
    """Return a passage in Search-R1's form for the policy; `rank` counts from 1."""
    title = f"(Title: {passage.title}) " if passage.title else ""
    return f"Doc {rank} {title}{' '.join(passage.text.split())}"


def parse_contents(passage_id: str, contents: str) -> Passage:
    """Return the passage in a `contents` field. A field of one line has no title."""
    first, newline, rest = contents.partition("\n")
    if not newline:
        return Passage(passage_id, "", contents.strip())
    title = first.strip()
    if len(title) >= 2 and title.startswith('"') and title.endswith('"'):
        title = title[1:-1].strip()
    return Passage(passage_id, title, rest.strip())
