import bz2
import datetime
import decimal
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from a2tgpo.data.question_set import Question, load_questions, unique_ids
from a2tgpo.io.errors import ConfigError

GOOD = {"id": "q1", "question": "Capital of France?", "answers": ["Paris", "Paris, France"], "hops": 1}


def write(tmp_path, *lines, name="questions.jsonl"):
    path = tmp_path / name
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return str(path)


def stated_json(record):
    return json.dumps({name: value for name, value in record.items() if value is not None})


def test_questions_keep_file_order_and_all_fields(tmp_path):
    second = {"question": "And of Peru?", "answers": ["Lima"]}
    assert load_questions(write(tmp_path, GOOD, b"", second)) == [
        Question(
            id="q1",
            question="Capital of France?",
            answers=("Paris", "Paris, France"),
            hops=1,
            record=json.dumps(GOOD),
        ),
        Question(id="1", question="And of Peru?", answers=("Lima",), record=json.dumps(second)),
    ]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"id": ', "not JSON"),
        (b"[1]", "list found"),
        (b'{"question": "\xff"}', "not UTF-8 (byte 15 of the line is 0xff)"),
        (
            '{"question": "été"}'.encode("latin-1"),
            "not UTF-8 (byte 15 of the line is 0xe9); save the file as UTF-8",
        ),
        (b"\xef\xbb\xbf{\xff", "not UTF-8 (byte 5 of the line is 0xff)"),
        ('{"question": "x"}'.encode("utf-16"), "not UTF-8 but UTF-16; save the file as UTF-8"),
        ('{"question": "x"}'.encode("utf-16-le"), "not UTF-8 but UTF-16 (byte 2 is NUL)"),
        (b'{"question": "\\ud83d half", "answers": ["x"]}', "half a character"),
        (b'{"question": "x", "answers": ["\\udfff"]}', "half a character"),
        (b'{"question": "x", "answers": ["' + b"9" * 10 + b'"], "n": ' + b"9" * 5000 + b"}", "not JSON"),
        ({"question": "x"}, "`answers` is missing"),
        ({"question": "x", "answers": []}, "at least one answer"),
        ({"question": "x", "answers": ["a", " "]}, "none of them empty"),
        ({"question": "x", "answers": "Paris"}, "a list with"),
        ({"question": " ", "answers": ["a"]}, "`question` is ' '"),
        ({"answers": ["a"]}, "`question` is missing"),
        ({"answers": ["a"], "prompt": [{"role": "system", "content": "x"}]}, "has no message of role user"),
        ({"answers": ["a"], "prompt": [{"role": "user"}]}, "`prompt`: `content` is missing"),
        ({"question": "x", "reward_model": {"style": "rule"}}, "the fields are question, reward_model"),
        ({"question": "x", "golden_answers": "Paris"}, "`golden_answers` is 'Paris'; allowed: a list with"),
        ({"question": "x", "answers": ["a"], "hops": True}, "`hops` is True"),
        ({"question": "x", "answers": ["a"], "hops": -1}, "`hops` is -1"),
        ({"question": "x", "answers": ["a"], "hops": 1.5}, "`hops` is 1.5"),
        (
            {"question": "x", "answers": ["a", 1912]},
            "`answers` holds 1912, which is a number; allowed: texts",
        ),
        ({"question": "x", "answer": True}, "`answer` holds True, which is true or false; allowed: texts"),
        ({"question": "x", "answers": ["\u200e"]}, "none of them empty"),
        ({"question": None, "answers": ["a"]}, "`question` is missing"),
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


def test_empty_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.test: .* has no question"):
        load_questions(write(tmp_path, b"", b"  "), key="data.test")
    with pytest.raises(ConfigError, match=r"data\.train: cannot read .*nowhere\.jsonl \(No such file"):
        load_questions(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.train: cannot read .* \(Is a directory\)"):
        load_questions(str(tmp_path))


def test_utf8_mark_of_windows_editors_is_skipped(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert load_questions(path)[0].id == "q1"


def test_packed_files_read_as_the_plain_one(tmp_path):
    path = write(tmp_path, GOOD)
    plain = Path(path).read_bytes()
    expected = load_questions(path)
    for name, pack in {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
        "jsonl": gzip.compress,  # whatever its name
    }.items():
        packed = tmp_path / f"packed.{name}"
        packed.write_bytes(pack(plain))
        assert load_questions(str(packed)) == expected


def test_parquet_reads_the_same_as_jsonl(tmp_path):
    path = tmp_path / "questions.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([GOOD]), path)
    assert load_questions(str(path)) == load_questions(write(tmp_path, GOOD))
    path.rename(tmp_path / "questions")
    assert load_questions(str(tmp_path / "questions")) == load_questions(write(tmp_path, GOOD))
    path.write_bytes(b"PAR1 rubbish")
    with pytest.raises(ConfigError, match="as Parquet"):
        load_questions(str(path))
    with pytest.raises(ConfigError, match=r"data\.train: cannot read .*none\.parquet"):
        load_questions(str(tmp_path / "none.parquet"))


def published(source, identity, question, answers, **others):
    """Return a row in the format of search agents' training sets for verl."""
    return {
        "id": identity,
        "question": question,
        "golden_answers": answers,
        "data_source": source,
        "prompt": [{"content": f"Answer the given question. Question: {question}\n", "role": "user"}],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": answers}, "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
        **others,
    }


def test_a_training_set_joined_of_two_is_read_as_published(tmp_path):
    path = tmp_path / "train.parquet"
    rows = [
        published("nq", "train_0", "who sings in the end", ["Chester"], metadata=None),
        published("hotpotqa", "train_0", "Which came first?", ["Arthur's", "Arthur's Magazine"]),
        published("hotpotqa", "train_1", "Where?", ["Berlin"]),
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [(q.id, q.question, q.answers) for q in load_questions(str(path))] == [
        ("nq/train_0", "who sings in the end", ("Chester",)),
        ("hotpotqa/train_0", "Which came first?", ("Arthur's", "Arthur's Magazine")),
        ("train_1", "Where?", ("Berlin",)),
    ]
    for row in rows:
        del row["golden_answers"], row["question"]
    rows[2]["reward_model"]["ground_truth"] = {"target": ["Rome"]}
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    questions = load_questions(str(path))
    assert questions[0].question == "Answer the given question. Question: who sings in the end\n"
    assert [q.answers for q in questions] == [("Chester",), ("Arthur's", "Arthur's Magazine"), ("Rome",)]


def test_fields_that_are_null_count_as_absent_in_jsonl_as_in_parquet(tmp_path):
    """In joined sets every record has every field."""
    rows = [
        {"id": None, "question": "Capital?", "answers": None, "golden_answers": ["Paris"], "hops": None},
        {"id": "b", "question": "When?", "answers": ["1912"], "golden_answers": None, "hops": 2},
    ]
    expected = [
        Question(id="0", question="Capital?", answers=("Paris",), record=stated_json(rows[0])),
        Question(id="b", question="When?", answers=("1912",), hops=2, record=stated_json(rows[1])),
    ]
    assert load_questions(write(tmp_path, *rows)) == expected
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "questions.parquet")
    assert load_questions(str(tmp_path / "questions.parquet")) == expected


def test_other_fields_reach_rewards_and_tools_with_dates_as_texts(tmp_path):
    row = GOOD | {"day": datetime.date(2026, 3, 1), "context": ["a", "b"], "cost": decimal.Decimal("1.5")}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "questions.parquet")
    (question,) = load_questions(str(tmp_path / "questions.parquet"))
    assert json.loads(question.record) == GOOD | {"day": "2026-03-01", "context": ["a", "b"], "cost": "1.5"}


def test_a_column_of_bytes_is_refused_with_its_row(tmp_path):
    rows = [GOOD | {"image": b"\xff"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "questions.parquet")
    with pytest.raises(ConfigError, match=r"questions\.parquet row 1: a field holds bytes"):
        load_questions(str(tmp_path / "questions.parquet"))


def test_whole_numbers_that_pandas_made_floats_of_are_read_as_such(tmp_path):
    (question,) = load_questions(write(tmp_path, GOOD | {"id": 7.0, "hops": 2.0}))
    assert (question.id, question.hops) == ("7", 2)


def test_golds_are_kept_as_a_policy_would_write_them(tmp_path):
    golds = [" Vienna \n", "New  York", "Beyonce\u0301", "Paris\u200e", "می\u200cخواهم"]
    (question,) = load_questions(write(tmp_path, GOOD | {"answers": golds}))
    assert question.answers == ("Vienna", "New York", "Beyonc\u00e9", "Paris", "می\u200cخواهم")


@pytest.mark.parametrize("truth", ["Paris", ["Paris"], {"target": "Paris"}, {"target": ["Paris"]}])
def test_a_ground_truth_may_be_one_text_or_a_list(tmp_path, truth):
    record = {
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "Capital?"}],
        "reward_model": {"ground_truth": truth},
    }
    (question,) = load_questions(write(tmp_path, record))
    assert (question.question, question.answers) == ("Capital?", ("Paris",))


def test_ids_that_repeat_are_made_unique_and_no_other_changes():
    assert unique_ids(["a", "b"], ["s", "t"]) == ["a", "b"]
    assert unique_ids(["a", "a", "b"], ["s", "t", "t"]) == ["s/a", "t/a", "b"]
    assert unique_ids(["a", "a", "a#2", "a"], [""] * 4) == ["a", "a#3", "a#2", "a#4"]
    assert unique_ids(["a", "a"], ["s", "s"]) == ["s/a", "s/a#2"]


def test_answers_may_be_missing_where_nothing_reads_them(tmp_path):
    path = tmp_path / "open.jsonl"
    records = [{"question": "Write a poem."}, {"question": "Sort.", "answers": []}, GOOD]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = load_questions(str(path), need_answers=False)
    assert [question.answers for question in found] == [(), (), ("Paris", "Paris, France")]
    with pytest.raises(ConfigError, match=r"line 1: `answers` is missing; .*algorithm.turn_signal=scores"):
        load_questions(str(path))
