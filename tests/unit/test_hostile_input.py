"""Input that seeded generators have damaged is used or refused in one line. It never crashes the program.

Each kind has CASES inputs. A refusal is a ConfigError, SearchError or ValueError of one line, as documented.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from scored import score_response

from a2tgpo.config.load import dump_config, load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.question_set import load_questions
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.tag_format import judged_text
from a2tgpo.protocol.tag_syntax import SEARCH_CALLS
from a2tgpo.search import http_client
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.passage import parse_contents

CASES = 3000
ROOT = Path(__file__).parents[2]
SCRAPS = [
    *(
        b"",
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b":",
        b",",
        b"\n",
        b"\t",
    ),
    *(b"&a", b"*a", b"!!python/object/apply:os.system", b"!!binary", b"---", b"<<: *a", b"null", b"true"),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 1500),
    *(
        b"<search>",
        b"</search>",
        b"<answer>",
        b"</answer>",
        b"\\boxed{",
        b"<result>",
        b"</think>",
        b"\\ud800",
    ),
    "\u202e\u0000\U0010ffff".encode(),
]


def broken(draw: random.Random, good: bytes) -> bytes:
    """Return `good` with some bytes changed, cut, doubled, moved or replaced by scraps."""
    content = bytearray(good)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 8])):
        place = draw.randrange(len(content) + 1)
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[place : place + draw.randrange(40)]
        elif kind == 2:
            content[place:place] = draw.choice(SCRAPS)
        elif kind == 3:
            content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(8)))
        elif kind == 4:
            end = min(len(content), place + draw.randrange(40))
            content[place:place] = content[place:end]
        else:
            lines = content.split(b"\n")
            draw.shuffle(lines)
            content = bytearray(b"\n".join(lines))
    return bytes(content)


def survives(function: Callable[[bytes], object], goods: list[bytes], *refusals: type[Exception]) -> int:
    """Feed CASES damaged inputs to `function`. Return how many were refused, each in one line."""
    draw, refused = random.Random(7), 0
    for number in range(CASES):
        content = broken(draw, draw.choice(goods))
        try:
            function(content)
        except refusals as error:
            refused += 1
            assert str(error) and "\n" not in str(error), (number, content[:200], str(error))
        except Exception as error:
            raise AssertionError(
                f"input {number}: {type(error).__name__}: {error}: {content[:300]!r}"
            ) from error
    return refused


def test_configuration_files(tmp_path):
    path = tmp_path / "run.yaml"
    goods = [(ROOT / "configs" / name).read_bytes() for name in ("quickstart.yaml", "train_8b.yaml")]
    whole = dump_config(load_config(ROOT / "configs" / "quickstart.yaml")).encode()

    def read(content: bytes) -> RunConfig:
        path.write_bytes(content)
        return load_config(path)

    assert CASES / 4 < survives(read, [*goods, whole], ConfigError) < CASES


def test_overrides():
    goods = [
        b"rollout.group_size=4",
        b"update.lr=1e-6",
        b"run.name=x",
        b"algorithm.kl_coef=[1]",
        b"data.train={}",
    ]
    base = ROOT / "configs" / "quickstart.yaml"

    def read(content: bytes) -> RunConfig:
        return load_config(base, [content.decode("utf-8", "surrogateescape")])

    assert survives(read, goods, ConfigError) > 0


def test_corpora_and_question_sets(tmp_path):
    path = tmp_path / "lines.jsonl"
    passages = b"".join(
        json.dumps({"id": str(i), "contents": f'"T{i}"\nsome text'}).encode() + b"\n" for i in range(4)
    )
    questions = b"".join(
        json.dumps({"id": i, "question": "why?", "answers": ["x", "y"], "hops": 2}).encode() + b"\n"
        for i in range(4)
    )
    for reader, good in ((load_corpus, passages), (load_questions, questions)):

        def read(content: bytes, reader: Callable = reader) -> object:
            path.write_bytes(content)
            return reader(str(path))

        assert CASES / 4 < survives(read, [good], ConfigError) < CASES


def test_answers_of_a_search_server():
    hits = [{"document": {"id": "1", "contents": '"T"\ntext'}, "score": 1.5}, {"id": 2, "contents": "plain"}]
    good = json.dumps({"result": [hits]}).encode()

    # OverflowError comes from an integer score too large for a float. `HttpSearch` turns OverflowError and ValueError
    # into a failed search.
    def read(body: bytes) -> object:
        return http_client._parse_answer(body, 1)

    assert survives(read, [good], ValueError, OverflowError) > 0


def test_what_a_policy_writes():
    good = b"<think> a </think> <search> b </search> <think> c </think> <answer> \\boxed{d} </answer>"

    def judge(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        query = SEARCH_CALLS.find_query(text, "search")
        assert "\n" not in query and "<search>" not in query
        assert SEARCH_CALLS.cut_at_stop(text) in text
        passage = parse_contents("1", text)
        assert "</result>" not in SEARCH_CALLS.format_result([passage.text]).removesuffix("</result>")
        score = score_response(judged_text([(text, True), (text, False)]), ["d"])
        assert score.reward in (-1.0, 0.0, 1.0) and score.exact_match in (0.0, 1.0)

    assert survives(judge, [good, b"<answer>" * 9, b"\\boxed{" * 50 + b"}" * 49]) == 0


def test_checkpoint_metadata(tmp_path):
    from torch.distributed.checkpoint.metadata import Metadata

    from a2tgpo.checkpoint.checked_files import size_and_checksum
    from a2tgpo.checkpoint.folder import MARKER, STATE, _first_fault, _read_marker, read_record
    from a2tgpo.checkpoint.sharded_state import _check_index

    index = pickle.dumps(Metadata(state_dict_metadata={}))
    record = {
        "step": 1,
        "layout": {"tp": 1},
        "schedule": {"steps_done": 3},
        "state": {"step": 1, "best": None},
    }

    def read_index(content: bytes) -> None:
        (tmp_path / "index").write_bytes(content)
        _check_index(tmp_path / "index")

    def read_state(content: bytes) -> None:
        (tmp_path / STATE).write_bytes(content)
        read_record(tmp_path)

    assert survives(read_index, [index], ValueError) > CASES / 4
    assert survives(read_state, [json.dumps(record).encode()], ValueError) > CASES / 4
    size, checksum = size_and_checksum([(0, 2, 7), (2, 1, 9)])
    files = {"absent": [3, 4], "sharded/0": [size, checksum], "rng/rank_0.pt": [1, 2]}
    markers = [{"files": files}, {"files": files, "pieces": {"sharded/0": [[0, 2, 7], [2, 1, 9]]}}]

    def judge(content: bytes) -> None:
        (tmp_path / MARKER).write_bytes(content)
        expected, pieces = _read_marker(tmp_path)
        assert _first_fault(tmp_path, expected, pieces), "a list of absent files passes"

    survives(judge, [json.dumps(marker).encode() for marker in markers], ValueError)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside"])
def test_a_checkpoint_cannot_name_files_elsewhere(tmp_path, name):
    from a2tgpo.checkpoint.folder import MARKER, _fault_of

    (tmp_path / MARKER).write_text(json.dumps({"files": {name: [1, 1]}}))
    assert "outside the folder" in _fault_of(tmp_path)
