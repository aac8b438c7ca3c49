import json

import pytest

from a2tgpo.config.check import ConfigError
from a2tgpo.data.question_set import Question, load_questions

GOOD = {"id": "q1", "question": "Capital of France?", "answers": ["Paris", "Paris, France"], "hops": 1}


def write(tmp_path, *lines, name="questions.jsonl"):
    path = tmp_path / name
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return str(path)


def test_questions_keep_file_order_and_all_fields(tmp_path):
    second = {"question": "And of Peru?", "answers": ["Lima"]}
    assert load_questions(write(tmp_path, GOOD, b"", second)) == [
        Question(id="q1", question="Capital of France?", answers=("Paris", "Paris, France"), hops=1),
        Question(id="1", question="And of Peru?", answers=("Lima",), hops=0),
    ]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"id": ', "not JSON"),
        (b"[1]", "list found"),
        (b'{"question": "\xff"}', "not UTF-8"),
        (b'{"question": "\\ud83d half", "answers": ["x"]}', "half a character"),
        (b'{"question": "x", "answers": ["\\udfff"]}', "half a character"),
        (b'{"question": "x", "answers": ["' + b"9" * 10 + b'"], "n": ' + b"9" * 5000 + b"}", "not JSON"),
        ({"question": "x"}, "`answers` is missing"),
        ({"question": "x", "answers": []}, "at least one answer"),
        ({"question": "x", "answers": ["a", " "]}, "none of them empty"),
        ({"question": "x", "answers": "Paris"}, "a list with"),
        ({"question": " ", "answers": ["a"]}, "`question` is ' '"),
        ({"answers": ["a"]}, "`question` is missing"),
        ({"question": "x", "answers": ["a"], "hops": True}, "`hops` is True"),
        ({"question": "x", "answers": ["a"], "hops": -1}, "`hops` is -1"),
        ({"question": "x", "answers": ["a"], "id": [1]}, "`id` is [1]"),
    ],
)
def test_bad_record_is_one_line_with_its_line_number(tmp_path, bad, says):
    path = write(tmp_path, GOOD, b"", bad)
    with pytest.raises(ConfigError) as caught:
        load_questions(path)
    message = str(caught.value)
    assert f"{path} line 3" in message
    assert says in message
    assert "\n" not in message


def test_empty_missing_and_repeated_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.test: .* holds no question"):
        load_questions(write(tmp_path, b"", b"  "), key="data.test")
    with pytest.raises(ConfigError, match=r"data\.train: cannot read .*nowhere\.jsonl \(No such file"):
        load_questions(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.train: cannot read .* \(Is a directory\)"):
        load_questions(str(tmp_path))
    with pytest.raises(ConfigError, match="id 'q1' at questions 1 and 2"):
        load_questions(write(tmp_path, GOOD, GOOD))


def test_utf8_mark_of_windows_editors_is_skipped(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert load_questions(path)[0].id == "q1"


def test_parquet_reads_the_same_or_says_what_it_needs(tmp_path):
    path = tmp_path / "questions.parquet"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(ConfigError, match="needs pyarrow; pip install pyarrow"):
            load_questions(str(path))
        return
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), path)
    assert load_questions(str(path)) == load_questions(write(tmp_path, GOOD))
    path.write_bytes(b"PAR1 rubbish")
    with pytest.raises(ConfigError, match="as Parquet"):
        load_questions(str(path))
