"""Answers that are stored as they arrive, and how the next start uses them."""

import dataclasses
import json

import pytest

from a2tgpo.checkpoint.find import find_model
from a2tgpo.config.load import load_config
from a2tgpo.config.reward import RewardConfig
from a2tgpo.data.question_set import Question
from a2tgpo.evaluate.answer_log import GREEDY, SAMPLE, AnswerLog, open_log
from a2tgpo.evaluate.evaluate import Answer
from a2tgpo.evaluate.evaluation_settings import evaluation_settings
from a2tgpo.io.errors import ConfigError


def answer(question_id, sample=0):
    return Answer(
        question_id=question_id, question="who?", golds=("Zoë", "Zoe"), hops=1, sample_index=sample, answer=None,
        exact_match=0.0, f1=0.5, format_ok=True, tool_calls=2, stop_reason="answer",
    )  # fmt: skip


def write(folder, replica, *entries):
    log = AnswerLog(folder, engine=replica)
    for kind, member in entries:
        log.append("nq", kind, member)
    log.close()


def test_answers_of_all_replicas_and_starts_come_back_equal(tmp_path):
    assert open_log(tmp_path / "out", {}) == {}
    write(tmp_path / "out", 0, (GREEDY, answer("a")), (SAMPLE, answer("a", 1)))
    write(tmp_path / "out", 1, (GREEDY, answer("b")))
    write(tmp_path / "out", 0, (GREEDY, answer("c")))
    assert open_log(tmp_path / "out", {}) == {
        ("nq", GREEDY, "a", 0): answer("a"),
        ("nq", SAMPLE, "a", 1): answer("a", 1),
        ("nq", GREEDY, "b", 0): answer("b"),
        ("nq", GREEDY, "c", 0): answer("c"),
    }


def test_an_answer_that_no_reward_could_judge_is_asked_for_again(tmp_path):
    unjudged = dataclasses.replace(answer("a"), reward_error="judge: no connection")
    judged = dataclasses.replace(answer("a"), scores={"judge": 1.0, "reward": 1.0})
    open_log(tmp_path, {"weights": "a"})
    write(tmp_path, 1, (GREEDY, unjudged), (GREEDY, dataclasses.replace(unjudged, question_id="b")))
    assert open_log(tmp_path, {"weights": "a"}) == {}
    with pytest.raises(ConfigError, match="weights"):
        open_log(tmp_path, {"weights": "b"})
    write(tmp_path, 0, (GREEDY, judged))  # from another engine, whose file is read first
    assert open_log(tmp_path, {"weights": "a"}) == {("nq", GREEDY, "a", 0): judged}


@pytest.mark.parametrize("num_bytes", [1, 40, -1])
def test_half_a_line_is_dropped_and_what_follows_is_read(tmp_path, num_bytes):
    open_log(tmp_path, {})
    write(tmp_path, 0, (GREEDY, answer("a")), (GREEDY, answer("b")))
    file = tmp_path / "replica_0.jsonl"
    first, second = file.read_bytes().splitlines()
    file.write_bytes(first + b"\n" + second[:num_bytes])
    write(tmp_path, 0, (GREEDY, answer("c")))
    assert [key[2] for key in open_log(tmp_path, {})] == ["a", "c"]


def test_answers_are_on_disk_before_the_log_is_closed(tmp_path):
    open_log(tmp_path, {})
    log = AnswerLog(tmp_path, engine=0)
    log.append("nq", GREEDY, answer("a"))
    assert len(open_log(tmp_path, {})) == 1
    log.close()


def test_a_folder_that_is_damaged_or_cannot_be_made_is_one_line(tmp_path):
    open_log(tmp_path, {})
    write(tmp_path, 0, (GREEDY, answer("a")))
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match=r"settings\.json is damaged; remove the folder"):
        open_log(tmp_path, {})
    with pytest.raises(ConfigError, match="--out: cannot use"):
        open_log(tmp_path / "settings.json" / "out", {})


@pytest.fixture
def begun(tmp_path):
    """Begin an evaluation. Return its configuration, weights, questions and folder."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    weights = find_model(tmp_path)
    config = load_config("configs/quickstart.yaml")
    sets = {"nq": [Question(id="a", question="who?", answers=("Zoë",))]}
    open_log(tmp_path / "out", evaluation_settings(config, weights.identity, sets))
    write(tmp_path / "out", 0, (GREEDY, answer("a")))
    return config, weights, sets, tmp_path / "out"


def test_a_start_that_failed_before_its_first_answer_binds_nobody(tmp_path):
    open_log(tmp_path, {"run.seed": 1})
    assert open_log(tmp_path, {"run.seed": 2}) == {}
    write(tmp_path, 0, (GREEDY, answer("a")))
    with pytest.raises(ConfigError, match=r"run\.seed 2, but it is now 1"):
        open_log(tmp_path, {"run.seed": 1})


def test_another_layout_and_another_address_of_the_server_go_on(begun):
    _, weights, sets, out = begun
    other = load_config(
        "configs/quickstart.yaml",
        [
            "parallel.tensor=2",
            "rollout.tensor_parallel=2",
            "search.url=http://n2/retrieve",
            "rollout.kv_cache_gib=1",
        ],
    )
    assert list(open_log(out, evaluation_settings(other, weights.identity, sets)).values()) == [answer("a")]


def test_an_evaluation_that_an_earlier_version_began_goes_on(begun):
    config, weights, sets, out = begun
    settings = json.loads((out / "settings.json").read_text())
    settings["search.max_passage_tokens"] = settings.pop("tools.max_part_tokens")
    (out / "settings.json").write_text(json.dumps(settings))
    assert len(open_log(out, evaluation_settings(config, weights.identity, sets))) == 1


def test_an_evaluation_without_a_tool_ignores_the_settings_of_the_tool(begun):
    config, weights, sets, _ = begun
    settings = evaluation_settings(config, weights.identity, sets)
    assert not [key for key in settings if key.startswith(("mcp.", "python.", "visit.", "web."))]
    python = load_config("configs/quickstart.yaml", ["tools.names=[search,python]"])
    assert "python.timeout_s" in evaluation_settings(python, weights.identity, sets)


def test_an_edited_record_is_refused_if_a_reward_may_read_it(begun):
    config, weights, sets, _ = begun
    edited = {
        name: [dataclasses.replace(q, record='{"a": 1}') for q in members] for name, members in sets.items()
    }
    judged = dataclasses.replace(config, reward=RewardConfig(names=("my.py:score",)))

    def settings(of_config, of_sets):
        return evaluation_settings(of_config, weights.identity, of_sets)

    assert settings(config, edited) == settings(config, sets)
    assert settings(judged, edited) != settings(judged, sets)


@pytest.mark.parametrize(
    "override", ["rollout.temperature=0.7", "search.top_k=3", "run.seed=1", "rollout.max_turns=1"]
)
def test_a_setting_that_decides_answers_is_refused_by_name(begun, override):
    _, weights, sets, out = begun
    other = load_config("configs/quickstart.yaml", [override])
    with pytest.raises(ConfigError, match=override.partition("=")[0] + ".*restore it, choose another --out"):
        open_log(out, evaluation_settings(other, weights.identity, sets))


def test_other_weights_and_other_questions_are_refused(begun):
    config, weights, sets, out = begun
    renamed = [dataclasses.replace(question, answers=("Zoe",)) for question in sets["nq"]]
    for others in ({"nq": renamed}, {"nq": sets["nq"] * 2}, {"hotpotqa": sets["nq"]}):
        with pytest.raises(ConfigError, match="with questions of"):
            open_log(out, evaluation_settings(config, weights.identity, others))
    (weights.path / "model.safetensors").write_bytes(b"22")
    with pytest.raises(ConfigError, match="with weights"):
        open_log(out, evaluation_settings(config, weights.identity, sets))
    assert json.loads((out / "settings.json").read_text())["run.seed"] == 0
