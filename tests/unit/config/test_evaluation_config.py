"""Several question sets in the configuration: which values are accepted, and the one-line errors for all others."""

import pytest

from a2tgpo.config.evaluation import EvaluationSet
from a2tgpo.config.load import dump_config, load_config
from a2tgpo.io.errors import ConfigError

BASE = ["run.name=x", "model.path=m", "search.corpus=c"]


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    return lambda *overrides: load_config(path, [*BASE, *overrides])


def test_a_set_is_a_file_or_a_file_with_a_limit_of_its_own(load, monkeypatch):
    monkeypatch.setenv("SETS", "/data")
    sets = "{nq: $SETS/nq.jsonl, hard: {file: hard.jsonl, max_questions: 0}}"
    config = load("data.train=t", f"evaluation.sets={sets}", "evaluation.max_questions=9")
    assert config.evaluation.files(config.data.test) == {
        "nq": EvaluationSet(file="/data/nq.jsonl", max_questions=9),
        "hard": EvaluationSet(file="hard.jsonl", max_questions=0),
    }


def test_without_sets_the_only_one_is_the_test_file(load):
    config = load("data.train=t", "data.test=held_out")
    assert config.evaluation.files(config.data.test) == {
        "test": EvaluationSet(file="held_out", max_questions=256)
    }


def test_training_files_may_have_weights_and_survive_a_dump(load, tmp_path, monkeypatch):
    monkeypatch.setenv("SETS", "/da$ta")
    config = load("data.train={$SETS/nq.jsonl: 1, hotpotqa.parquet: 2.5}", "data.test=t")
    assert config.data.train_files == {"/da$ta/nq.jsonl": 1, "hotpotqa.parquet": 2.5}
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config
    assert load("data.train=nq.jsonl", "data.test=t").data.train_files == {"nq.jsonl": 1.0}


@pytest.mark.parametrize("best_by", ["none", "f1", "mean_at_4", "pass_at_2", "nq/em", "hard/pass_at_4"])
def test_the_best_checkpoint_may_be_chosen_by_any_score(load, best_by):
    sets = "evaluation.sets={nq: a, hard: b}"
    assert load("data.train=t", sets, "evaluation.samples=4", f"checkpoint.best_by={best_by}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.test=t", "data.train={}"], "allowed: a file, or a mapping of each file to a number > 0"),
        (["data.test=t", "data.train={1: 1}"], "allowed: names that are texts; put them in quotes"),
        (["data.test=t", "data.train={~: 1}"], "allowed: names that are texts; put them in quotes"),
        (
            ["data.test=t", "data.train={$HOME/a: 1, ~/a: 2}"],
            "names for the same file: $HOME/a, ~/a; name each",
        ),
        (["data.test=t", "data.train={a: 0}"], "allowed: a file, or a mapping of each file to a number > 0"),
        (
            ["data.test=t", "data.train={a: true}"],
            "allowed: a file, or a mapping of each file to a number > 0",
        ),
        (["data.test=t", "data.train=[a]"], "data.train is ['a']; allowed: a text, or a mapping"),
        (["data.train=t", "evaluation.sets={'a b': f}"], "allowed: names of letters, digits, _, - and ."),
        (
            ["data.train=t", "evaluation.sets={nq: 3}"],
            "evaluation.sets.nq is 3; allowed: a file, or {file: FILE",
        ),
        (["data.train=t", "evaluation.sets={nq: {max_questions: 3}}"], "allowed: a file, or {file: FILE"),
        (["data.train=t", "evaluation.sets={nq: {file: f, max_questions: -1}}"], "an integer N >= 0"),
        (["data.train=t", "data.test=t", "evaluation.samples=-1"], "evaluation.samples is -1; allowed: >= 0"),
        (
            ["data.train=t", "data.test=t", "checkpoint.best_by=nq/em"],
            "checkpoint.best_by is 'nq/em'; allowed: em |",
        ),
        (
            ["data.train=t", "data.test=t", "checkpoint.best_by=pass_at_2"],
            "em | em_format_gated | f1 | reward | none",
        ),
    ],
)
def test_a_bad_value_is_one_line(load, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.train=t"],
            "data.test is ''; allowed: a question file; it may be left out if evaluation.sets",
        ),
        (
            ["data.train=", "data.test=t"],
            "data.train is ''; allowed: a file, or a mapping of files to weights",
        ),
    ],
)
def test_a_training_needs_questions_and_held_out_questions(load, overrides, message):
    config = load(*overrides)  # an exported agent has neither setting
    with pytest.raises(ConfigError) as caught:
        config.check_training()
    assert message in str(caught.value)
