"""Load the passages of a corpus into memory."""

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.json_lines import read_json_lines, text_field
from a2tgpo.search.passage import Passage, parse_contents


def load_corpus(path: str, *, key: str = "search.corpus") -> list[Passage]:
    """Return every passage of a JSONL file in Search-R1's format, in file order.

    A record has `id` (a text or an integer) and `contents` (the title in double quotes, a newline, the text).

    Raises:
        ConfigError: with a one-line message that names `key`, if the file cannot be read or is not a valid corpus.
    """
    passages: dict[str, Passage] = {}
    for where, record in read_json_lines(path, key=key):
        passage = parse_passage(record, where)
        if passage.id in passages:
            raise ConfigError(f"{where}: id {passage.id!r} occurs twice; ids must be unique")
        passages[passage.id] = passage
    if not passages:
        raise ConfigError(f"{key}: {path} has no passage; give a corpus with at least one")
    return list(passages.values())


def parse_passage(record: dict, where: str) -> Passage:
    """Return the passage in `record`. If the record is malformed, raise a ConfigError that starts with `where`."""
    identity = record.get("id")
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        found = "missing" if "id" not in record else f"{identity!r:.60}"
        raise ConfigError(f"{where}: `id` is {found}; allowed: a text or an integer")
    return parse_contents(str(identity), text_field(record, "contents", where))
