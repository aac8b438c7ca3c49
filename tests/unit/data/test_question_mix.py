"""Several training files as one set of questions."""

import json

import pytest

from a2tgpo.data.question_mix import load_question_mix
from a2tgpo.io.errors import ConfigError


def write(path, *ids):
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"id": i, "question": f"who {i}?", "answers": ["a"]}) for i in ids]
    path.write_text("\n".join(lines))
    return str(path)


def test_one_file_keeps_the_ids_of_its_questions(tmp_path):
    mix = load_question_mix({write(tmp_path / "nq.jsonl", "x", "y"): 1.0})
    assert ([question.id for question in mix.questions], mix.sizes, mix.weights) == (["x", "y"], [2], [1.0])


def test_equal_ids_of_two_files_stay_apart_under_the_names_of_the_sets(tmp_path):
    files = {write(tmp_path / "nq.jsonl", "x", "y"): 1.0, write(tmp_path / "hotpotqa/train.jsonl", "x"): 3.0}
    mix = load_question_mix(files)
    assert [question.id for question in mix.questions] == ["nq/x", "nq/y", "hotpotqa/x"]
    assert (mix.sizes, mix.weights) == ([2, 1], [1.0, 3.0])


def test_two_files_with_one_name_are_refused(tmp_path):
    files = {write(tmp_path / "a/nq.jsonl", "x"): 1.0, write(tmp_path / "b/nq.jsonl", "x"): 1.0}
    with pytest.raises(ConfigError, match="both called 'nq'; rename one"):
        load_question_mix(files)
