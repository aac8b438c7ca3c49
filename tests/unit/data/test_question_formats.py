"""Small files in exactly the formats in which question sets are published."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from prepare_data import prepare
from pyarrow import parquet

from a2tgpo.data.question_set import load_questions
from a2tgpo.io.errors import ConfigError

ROOT = Path(__file__).parents[3]

HOTPOTQA = json.dumps(
    [
        {
            "_id": "5a8b57f25542995d1e6f1371",
            "question": "Were Scott Derrickson and Ed Wood of the same nationality?",
            "answer": "yes",
            "type": "comparison",
            "level": "hard",
            "supporting_facts": [["Scott Derrickson", 0], ["Ed Wood", 0]],
            "context": [["Ed Wood", ["He was American."]]],
        },
        {
            "_id": "5a8c7595554299585d9e36b6",
            "question": "Which caf\u00e9 did Zo\u00eb open?",
            "answer": "Caf\u00e9 M\u00fcller",
            "type": "bridge",
            "level": "medium",
            "supporting_facts": [["Zo\u00eb", 0], ["Zo\u00eb", 1]],
            "context": [],
        },
    ]
)
TWOWIKI = json.dumps(
    [
        {
            "_id": "13f5ad2c088c11ebbd6fac1f6bf848b6",
            "type": "bridge_comparison",
            "question": "Are the directors of Move and M\u00e9diterran\u00e9e from the same country?",
            "context": [["Stuart Rosenberg", ["He was American."]]],
            "supporting_facts": [
                ["Move (1970 film)", 0],
                ["M\u00e9diterran\u00e9e", 0],
                ["Stuart Rosenberg", 0],
            ],
            "evidences": [["Move (1970 film)", "director", "Stuart Rosenberg"]],
            "answer": "no",
            "evidences_id": [],
            "answer_id": None,
        },
        {
            "_id": "8813f87c0bdd11eba7f7acde48001122",
            "type": "compositional",
            "question": "Who is the mother of the director of film Polish-Russian War?",
            "context": [],
            "supporting_facts": [["Polish-Russian War", 1], ["Xawery", 2]],
            "evidences": [],
            "answer": "Ma\u0142gorzata Braunek",
            "evidences_id": [],
            "answer_id": "Q274277",
        },
    ]
)
ALIASES = json.dumps({"Q_id": "Q274277", "aliases": ["Malgorzata Braunek"], "demonyms": []}) + "\n"
MUSIQUE = "".join(
    json.dumps(record, ensure_ascii=False) + "\n"
    for record in (
        {
            "id": "3hop1__13548_13529_7713",
            "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "p", "is_supporting": True}],
            "question": "When was the person who \u2026 born?",
            "question_decomposition": [{"id": 1, "question": "q", "answer": "a", "paragraph_support_idx": 0}],
            "answer": "1872",
            "answer_aliases": ["in 1872", "1872"],
            "answerable": True,
        },
        {
            "id": "2hop__482757_12019",
            "paragraphs": [],
            "question": "Unanswerable?",
            "question_decomposition": [],
            "answer": "x",
            "answer_aliases": [],
            "answerable": False,
        },
    )
)
BAMBOOGLE = (
    "Question,Answer\r\n"
    '"Who was president of the United States in the year that Citibank was founded, then?",james madison\r\n'
    'What rocket was the first spacecraft on ""Mars"" launched by?,"Proton-K, or 8K82K"\r\n'
)
NQ_OPEN = (
    '{"question": "when was the last time on the moon", "answer": ["14 December 1972 UTC", "December 1972"]}\n'
    '{"question": "who wrote he ain\'t heavy he\'s my brother lyrics", "answer": ["Bobby Scott", "Bob Russell"]}\n'
)
NQ_SIMPLIFIED = "".join(
    json.dumps(record) + "\n"
    for record in (
        {
            "annotations": [
                {
                    "yes_no_answer": "NONE",
                    "long_answer": {"start_token": 0, "end_token": 8, "candidate_index": 0},
                    "short_answers": [{"start_token": 2, "end_token": 4}],
                    "annotation_id": 1,
                }
            ],
            "document_text": "The composer Bobby Scott wrote it .",
            "question_text": "who wrote it",
            "example_id": 5655493461695504401,
        },
        {
            "annotations": [{"yes_no_answer": "YES", "long_answer": {}, "short_answers": []}],
            "document_text": "It is .",
            "question_text": "is it",
            "example_id": 5328212470870865242,
        },
        {
            "annotations": [
                {"yes_no_answer": "NONE", "long_answer": {"start_token": -1}, "short_answers": []}
            ],
            "document_text": "No .",
            "question_text": "why",
            "example_id": 7,
        },
    )
)
TRIVIAQA = json.dumps(
    {
        "Data": [
            {
                "Answer": {
                    "Aliases": ["Sunset Blvd", "Sunset Boulevard"],
                    "MatchedWikiEntityName": "",
                    "NormalizedAliases": ["sunset blvd"],
                    "NormalizedValue": "sunset boulevard",
                    "Type": "WikipediaEntity",
                    "Value": "Sunset Boulevard",
                },
                "EntityPages": [],
                "Question": "Which Lloyd Webber musical premiered in the US on 10th December 1993?",
                "QuestionId": "tc_33",
                "QuestionSource": "http://www.triviacountry.com/",
            },
            {
                "EntityPages": [],
                "Question": "Of the test split?",
                "QuestionId": "tc_34",
                "QuestionSource": "",
            },
        ],
        "Domain": "Web",
        "Split": "dev",
        "VerifiedEval": False,
        "Version": 1.0,
    }
)
POPQA = (
    "id\tsubj\tprop\tobj\tsubj_id\tprop_id\tobj_id\ts_aliases\to_aliases\ts_uri\to_uri\ts_wiki_title\to_wiki_title"
    "\ts_pop\to_pop\tquestion\tpossible_answers\n"
    '4222362\tGeorge Rankin\toccupation\tpolitician\t1850297\t22\t2834605\t"[""George James Rankin""]"\t'
    '"[""political leader""]"\thttp://a\thttp://b\tGeorge Rankin\tPolitician\t142\t25692\t'
    'What is George Rankin\'s occupation?\t"[""politician"", ""political leader"", ""pol\\u00edtico""]"\n'
)
JSONL = (
    '{"id": 7, "question": "  Two\\n lines? ", "golden_answers": ["a", "b"]}\n'
    '{"question": "One?", "answer": true}\n'
    '{"question": "None?", "answers": ["", " "]}\n'
    '{"id": null, "question": "When?", "answers": [1912.0, 3.5], "golden_answers": null, "hops": 2.0}\n'
)

SETS = {
    "hotpotqa": (
        HOTPOTQA,
        [
            ("5a8b57f25542995d1e6f1371", ("yes",), 2),
            ("5a8c7595554299585d9e36b6", ("Caf\u00e9 M\u00fcller",), 1),
        ],
        {},
    ),
    "2wiki": (
        TWOWIKI,
        [
            ("13f5ad2c088c11ebbd6fac1f6bf848b6", ("no",), 3),
            ("8813f87c0bdd11eba7f7acde48001122", ("Ma\u0142gorzata Braunek", "Malgorzata Braunek"), 2),
        ],
        {},
    ),
    "musique": (MUSIQUE, [("3hop1__13548_13529_7713", ("1872", "in 1872"), 3)], {"unanswerable": 1}),
    "bamboogle": (
        BAMBOOGLE,
        [("bamboogle-0", ("james madison",), 2), ("bamboogle-1", ("Proton-K, or 8K82K",), 2)],
        {},
    ),
    "nq": (
        NQ_OPEN,
        [("nq-0", ("14 December 1972 UTC", "December 1972"), 0), ("nq-1", ("Bobby Scott", "Bob Russell"), 0)],
        {},
    ),
    "triviaqa": (TRIVIAQA, [("tc_33", ("Sunset Boulevard", "Sunset Blvd"), 0)], {"no answer": 1}),
    "popqa": (POPQA, [("4222362", ("politician", "political leader", "pol\u00edtico"), 1)], {}),
    "jsonl": (
        JSONL,
        [("7", ("a", "b"), 0), ("jsonl-1", ("yes",), 0), ("jsonl-3", ("1912", "3.5"), 2)],
        {"no answer": 1},
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_published_set_becomes_questions(name, tmp_path, capsys):
    content, expected, left_out = SETS[name]
    raw, out = tmp_path / "raw", tmp_path / "deep" / "test.jsonl"
    raw.write_text(content, encoding="utf-8")
    aliases = tmp_path / "id_aliases.json"
    aliases.write_text(ALIASES)
    prepare(
        [name, "--in", str(raw), "--out", str(out), *(["--aliases", str(aliases)] if name == "2wiki" else [])]
    )
    questions = load_questions(str(out))
    assert [(q.id, q.answers, q.hops) for q in questions] == expected
    report = json.loads((tmp_path / "deep" / "test.jsonl.report.json").read_text())
    assert report["left_out"] == left_out and report["questions"] == len(expected)
    assert report["yes_no_answers"] == sum(answers[0] in ("yes", "no") for _, answers, _ in expected)
    assert f"wrote {out}" in capsys.readouterr().out


def test_quotes_and_commas_of_a_table_belong_to_its_fields(tmp_path):
    raw = tmp_path / "bamboogle.csv"
    raw.write_text(BAMBOOGLE.replace('""Mars""', "Mars"), encoding="utf-8-sig", newline="")
    prepare(["bamboogle", "--in", str(raw), "--out", str(tmp_path / "o.jsonl")])
    first, second = load_questions(str(tmp_path / "o.jsonl"))
    assert first.question.endswith("founded, then?") and second.answers == ("Proton-K, or 8K82K",)


def test_natural_questions_with_documents_give_spans_and_leave_out_what_has_none(tmp_path):
    raw = tmp_path / "v1.0-simplified_nq-dev.jsonl.gz"
    raw.write_bytes(gzip.compress(NQ_SIMPLIFIED.encode()))
    prepare(["nq", "--in", str(raw), "--out", str(tmp_path / "o.jsonl")])
    questions = load_questions(str(tmp_path / "o.jsonl"))
    assert [(q.id, q.answers) for q in questions] == [
        ("5655493461695504401", ("Bobby Scott",)),
        ("5328212470870865242", ("yes",)),
    ]
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    assert report["left_out"] == {"unanswerable": 1}


NQ_ORIGINAL = {
    "annotations": [
        {
            "yes_no_answer": "NONE",
            "long_answer": {"start_token": 0, "end_token": 7},
            "short_answers": [{"start_token": 1, "end_token": 4, "start_byte": 3, "end_byte": 30}],
        }
    ],
    "document_html": "<P>Lake <B>Superior</B> is it</P>",
    "document_tokens": [
        {"token": token, "html_token": token.startswith("<"), "start_byte": 0, "end_byte": 1}
        for token in ("<P>", "Lake", "<B>", "Superior", "</B>", "is", "it", "</P>")
    ],
    "question_text": "which is the largest lake",
    "example_id": 797803103760793766,
}


def test_natural_questions_before_simplification_give_spans_without_tags(tmp_path):
    raw = tmp_path / "v1.0-simplified_nq-dev-all.jsonl.gz"
    raw.write_bytes(gzip.compress(json.dumps(NQ_ORIGINAL).encode()))
    prepare(["nq", "--in", str(raw), "--out", str(tmp_path / "o.jsonl")])
    (question,) = load_questions(str(tmp_path / "o.jsonl"))
    assert (question.id, question.answers) == ("797803103760793766", ("Lake Superior",))
    assert question.question == "which is the largest lake"


PACKERS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("packer", PACKERS)
def test_a_damaged_packed_file_is_one_line(packer, tmp_path):
    raw, out = tmp_path / "v1.0-simplified_nq-dev.jsonl.packed", tmp_path / "o.jsonl"
    whole = PACKERS[packer](NQ_SIMPLIFIED.encode())
    raw.write_bytes(whole)
    prepare(["nq", "--in", str(raw), "--out", str(out)])
    out.unlink()
    middle = len(whole) // 2
    changed = bytes([whole[middle] ^ 0xFF])
    for content in (whole[:-9], whole[:middle], whole[:middle] + changed + whole[middle + 1 :]):
        raw.write_bytes(content)
        with pytest.raises(ConfigError, match=r"--in: .*(is damaged or cut short|cannot read)") as caught:
            prepare(["nq", "--in", str(raw), "--out", str(out)])
        assert "\n" not in str(caught.value) and not out.exists()


def test_several_packed_parts_in_one_file_are_all_read(tmp_path):
    first, second, third = NQ_SIMPLIFIED.splitlines(keepends=True)
    raw = tmp_path / "raw"
    for pack in PACKERS.values():
        raw.write_bytes(pack((first + second[:9]).encode()) + pack((second[9:] + third).encode()))
        prepare(["nq", "--in", str(raw), "--out", str(tmp_path / "o.jsonl")])
        assert len(load_questions(str(tmp_path / "o.jsonl"))) == 2


def test_ids_that_repeat_are_made_unique_and_counted(tmp_path):
    raw, out = tmp_path / "raw.parquet", tmp_path / "o.jsonl"
    rows = [
        {"id": "train_0", "question": f"{source}?", "golden_answers": ["a"], "data_source": source}
        for source in ("nq", "hotpotqa")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), raw)
    prepare(["jsonl", "--in", str(raw), "--out", str(out)])
    assert [question.id for question in load_questions(str(out))] == ["nq/train_0", "hotpotqa/train_0"]
    assert json.loads((tmp_path / "o.jsonl.report.json").read_text())["ids_made_unique"] == 2


def test_one_set_of_a_file_that_joins_several_is_taken(tmp_path):
    raw, out = tmp_path / "raw.parquet", tmp_path / "o.jsonl"
    rows = [
        {"id": f"test_{i}", "question": f"{source} {i}?", "golden_answers": ["a"], "data_source": source}
        for i in range(2)
        for source in ("nq", "hotpotqa")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), raw)
    prepare(["jsonl", "--in", str(raw), "--out", str(out), "--data-source", "hotpotqa"])
    assert [question.question for question in load_questions(str(out))] == ["hotpotqa 0?", "hotpotqa 1?"]
    with pytest.raises(ConfigError, match=r"--data-source is 'popqa'; .* has: nq \| hotpotqa"):
        prepare(["jsonl", "--in", str(raw), "--out", str(out), "--data-source", "popqa"])
    with pytest.raises(ConfigError, match="--data-source is 'a'; allowed: with jsonl only"):
        prepare(["nq", "--in", str(raw), "--out", str(out), "--data-source", "a"])


def test_a_disk_that_is_full_names_the_file_and_keeps_what_was_there(tmp_path):
    raw, out = tmp_path / "in.jsonl", tmp_path / "q.jsonl"
    raw.write_text("".join(f'{{"question": "what is {i}?", "answers": ["{i}"]}}\n' for i in range(2000)))
    out.write_text("before\n")
    command = f"ulimit -f 16; {sys.executable} tools/prepare_data.py jsonl --in {raw} --out {out}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: --out: cannot write {out} (File too large); choose another\n"
    assert out.read_text() == "before\n" and sorted(tmp_path.iterdir()) == [raw, out]


def test_the_report_counts_doubles_empty_answers_and_overlap(tmp_path):
    raw, train = tmp_path / "raw.jsonl", tmp_path / "train.jsonl"
    train.write_text('{"question": "The first question?", "answers": ["x"]}\n')
    texts = ["First question", "the FIRST question!", "Second one here", "\u00dcber alles?"]
    raw.write_text("".join(json.dumps({"question": t, "answers": ["The", "b"]}) + "\n" for t in texts))
    prepare(["jsonl", "--in", str(raw), "--out", str(tmp_path / "o.jsonl"), "--against", str(train)])
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    assert report["repeated_questions"] == 1
    assert report["overlap"] == {"questions": 2, "share": 0.5}
    assert report["answers_empty_when_normalized"] == 4 and report["non_ascii_questions"] == 1
    assert report["question_words"] == {"p0": 2.0, "p5": 2.0, "p50": 2.5, "p95": 3.0, "p100": 3.0}


MISTAKES = {
    "missing file": ("hotpotqa", None, "cannot read"),
    "no JSON": ("hotpotqa", '[\n{"_id": 1,\n', "not JSON at line"),
    "another format": ("hotpotqa", '{"data": []}', "not hotpotqa's format; expected a list of items"),
    "item without question": ("hotpotqa", '[{"_id": "1", "answer": "a"}]', "item 1: `question` is missing"),
    "broken line": ("musique", MUSIQUE + "{\n", "line 3: not JSON"),
    "wrong columns": ("popqa", "question\tanswer\nq\ta\n", "line 1: no column 'id'"),
    "answers that are no list": (
        "popqa",
        "id\tquestion\tpossible_answers\n1\tq\tpolitician\n",
        "line 2: `possible_answers` is not a JSON list",
    ),
    "latin-1 in a table": (
        "bamboogle",
        "Question,Answer\nO\u00f9?,a\n".encode("latin-1"),
        "raw line 2: not UTF-8 (byte 2 of the line is 0xf9); save the file as UTF-8",
    ),
    "UTF-16": ("hotpotqa", "[]".encode("utf-16"), "not UTF-8 but UTF-16"),
    "ZIP archive": ("jsonl", b"PK\x03\x04rest", "is a ZIP archive; unpack it"),
    "empty file": ("jsonl", "", "has no question with an answer (no item)"),
    "test split without answers": (
        "hotpotqa",
        '[{"_id": "1", "question": "q"}]',
        "has no question with an answer (1 x no answer)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_source_is_refused_in_one_line_and_leaves_nothing(mistake, tmp_path):
    name, content, message = MISTAKES[mistake]
    raw, out = tmp_path / "raw", tmp_path / "out.jsonl"
    if content is not None:
        raw.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        prepare([name, "--in", str(raw), "--out", str(out)])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path != raw] == []


def test_home_and_variables_in_arguments_are_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "raw").write_text('{"question": "q", "answers": ["a"]}\n')
    prepare(["jsonl", "--in=~/raw", "--out=${OUT}/q.jsonl"])
    assert len(load_questions(str(tmp_path / "out" / "q.jsonl"))) == 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        prepare(["jsonl", "--in=~/raw", "--out=$NOT_SET_HERE/q.jsonl"])
    assert ended.value.code == 2
    assert (
        "--out: the path is '$NOT_SET_HERE/q.jsonl', but $NOT_SET_HERE is not set" in capsys.readouterr().err
    )


def test_a_folder_is_no_file_to_write(tmp_path):
    (tmp_path / "raw").write_text('{"question": "q", "answers": ["a"]}\n')
    with pytest.raises(ConfigError, match=r"--out is .*allowed: a file"):
        prepare(["jsonl", "--in", str(tmp_path / "raw"), "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"--out is .*allowed: a folder"):
        prepare(["arithmetic", "--out", str(tmp_path / "raw")])


def test_more_sums_than_there_are_soon_enough_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--train-questions .* allowed: at most 1000000"):
        prepare(["arithmetic", "--out", str(tmp_path / "a"), "--train-questions", "90000000"])


def test_the_program_ends_with_one_line_and_a_code(tmp_path):
    command = [
        sys.executable,
        "tools/prepare_data.py",
        "jsonl",
        "--in",
        "none.jsonl",
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --in: cannot read none.jsonl")
    assert done.stderr.count("\n") == 1 and not done.stdout
    done = subprocess.run([*command[:2], "squad"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "invalid choice: 'squad'" in done.stderr


def test_sums_are_right_and_demonstrated_with_the_calculator(tmp_path):
    out = tmp_path / "a"
    prepare(
        [
            "arithmetic",
            "--out",
            str(out),
            "--train-questions",
            "50",
            "--test-questions",
            "20",
            "--demonstrations",
            "60",
        ]
    )
    words = {"plus": "+", "minus": "-", "times": "*"}
    train, test = load_questions(str(out / "train.jsonl")), load_questions(str(out / "test.jsonl"))
    assert (len(train), len(test)) == (50, 20)
    assert not {q.question for q in train} & {q.question for q in test}
    for question in train + test:
        terms = question.question.removeprefix("What is ").removesuffix("?").split()
        assert question.answers == (str(eval(" ".join(words.get(term, term) for term in terms))),)
    from a2tgpo.data.demonstrations import load_demonstrations

    demonstrations = load_demonstrations(str(out / "demonstrations.jsonl"))
    assert {d.quality for d in demonstrations} == {"good", "guess"}
    for demonstration in demonstrations:
        right = demonstration.question.answers[0]
        last = demonstration.turns[-1][0]
        assert (f"{{{right}}}" in last) == (demonstration.quality == "good")
        if demonstration.quality == "good":
            assert demonstration.turns[0] == (demonstration.turns[0][0], f" <result>\n{right}\n</result>")
