import gzip
import json
from pathlib import Path

import pytest

from a2tgpo.io.errors import ConfigError
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.corpus_file import CorpusFile, scan
from a2tgpo.search.passage import Passage, parse_contents

GOOD = {"id": 7, "contents": '"Lima"\nLima is the capital of Peru.'}


def write(tmp_path, *lines):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_packed_corpus_is_read_but_not_indexed_by_place(tmp_path):
    path = write(tmp_path, GOOD)
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert load_corpus(str(packed)) == load_corpus(path)
    with pytest.raises(
        ConfigError, match=r"--corpus: .*corpus\.jsonl\.gz is compressed, .*; unpack it first"
    ) as caught:
        scan(packed)
    assert "\n" not in str(caught.value)


def test_title_and_text_come_apart_and_together_again(tmp_path):
    (passage,) = load_corpus(write(tmp_path, GOOD))
    assert passage == Passage("7", "Lima", "Lima is the capital of Peru.")
    assert passage.contents == GOOD["contents"]


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ("only text", "", "only text"),
        ("Bare title\nbody\nmore", "Bare title", "body\nmore"),
        ('""\nbody', "", "body"),
        ('"The "Big" One"\nbody', 'The "Big" One', "body"),
    ],
)
def test_contents_of_other_shapes_are_read(contents, title, text):
    assert parse_contents("1", contents) == Passage("1", title, text)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "not JSON"),
        ({"contents": "x"}, "`id` is missing"),
        ({"id": None, "contents": "x"}, "`id` is None"),
        ({"id": "a"}, "`contents` is missing"),
        ({"id": "a", "contents": ["x"]}, "`contents` is ['x']"),
        ({"id": "a", "contents": ""}, "`contents` is ''"),
        (GOOD, "id '7' occurs twice"),
    ],
)
def test_bad_passage_is_refused_with_its_line(tmp_path, bad, says):
    with pytest.raises(ConfigError) as caught:
        load_corpus(write(tmp_path, GOOD, bad))
    assert "corpus.jsonl line 2: " in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_passage(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "7", "contents": "one"}\n{"id": "8", "contents": "two"}\n')
    assert load_corpus(str(path)) == list(CorpusFile(path, scan(path)))  # the same in memory and on disk


def test_empty_and_missing_corpora_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"search\.corpus: .* has no passage"):
        load_corpus(write(tmp_path))
    with pytest.raises(ConfigError, match=r"--corpus: cannot read nowhere \(No such file"):
        load_corpus("nowhere", key="--corpus")
