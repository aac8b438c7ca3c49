"""The reward `judge` against a server over real HTTP."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from stub_judge import StubJudge, chat
from test_reward_files import QUICKSTART, RIGHT, episode_of

from a2tgpo.config.load import load_config
from a2tgpo.io.errors import ConfigError
from a2tgpo.reward.episode import RewardError
from a2tgpo.reward.methods import judge


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def stub(quick):
    """Return a function that starts a stub judge. All are closed afterwards."""
    made = []

    def start(script):
        made.append(StubJudge(script))
        return made[-1]

    yield start
    for server in made:
        server.close()


def config_of(url, tmp_path, **settings):
    overrides = [f"judge.{name}={value}" for name, value in ({"model": "m", "url": url} | settings).items()]
    return load_config(QUICKSTART, ["reward.names=[judge]", f"run.root={tmp_path}", *overrides])


def judge_of(server, tmp_path, **settings):
    return judge.build(config_of(server.url, tmp_path, **settings))


def test_the_last_verdict_of_the_reply_decides_and_nothing_is_asked_twice(stub, tmp_path):
    server = stub(
        lambda prompt, _: chat("It is not incorrect.\nCorrect" if "Paris" in prompt else "INCORRECT")
    )
    asked = judge_of(server, tmp_path)
    assert [asked.score(episode_of(RIGHT)) for _ in range(3)] == [1.0] * 3
    assert asked.score(episode_of(RIGHT.replace("Paris", "Rome"), answers=("Bonn",))) == 0.0
    assert asked.score(episode_of("no answer")) == 0.0
    assert asked.take_counts() == {"calls": 2, "retries": 0, "unparsed": 0, "cache_hits": 2}
    assert asked.take_counts() == {"calls": 0, "retries": 0, "unparsed": 0, "cache_hits": 0}
    request = server.asked[0]
    assert (request["path"], request["model"], request["temperature"]) == ("/v1/chat/completions", "m", 0)
    assert "Question: q\nGold answers: Paris\nResponse: Paris\n" in request["messages"][0]["content"]


def test_a_later_start_asks_nothing_again_also_after_a_torn_line(stub, tmp_path):
    server = stub(lambda *_: chat("correct"))
    first = judge_of(server, tmp_path)
    questions = [episode_of(RIGHT, question=str(number)) for number in range(3)]
    assert [first.score(episode) for episode in questions] == [1.0] * 3
    (file,) = tmp_path.glob("*/judge/*.jsonl")
    file.write_bytes(b'5\n"ab"\n[["k"], "correct"]\n' + file.read_bytes()[:-5])
    again = judge_of(server, tmp_path)
    assert [again.score(episode) for episode in questions] == [1.0] * 3
    assert len(server.asked) == 4
    third = judge_of(server, tmp_path)
    assert [third.score(episode) for episode in questions] == [1.0] * 3
    assert len(server.asked) == 4
    uncached = judge_of(server, tmp_path, cache="false")
    assert uncached.score(questions[0]) == 1.0
    assert len(server.asked) == 5


def test_threads_that_want_the_same_verdict_send_one_request(stub, tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def script(*_):
        begun.set()
        go_on.wait(30)
        return chat("correct")

    server = stub(script)
    asked = judge_of(server, tmp_path)
    with ThreadPoolExecutor(4) as threads:
        verdicts = [threads.submit(asked.score, episode_of(RIGHT)) for _ in range(4)]
        assert begun.wait(30)
        go_on.set()
        assert [verdict.result() for verdict in verdicts] == [1.0] * 4
    assert len(server.asked) == 1


FAIL_ONCE = {
    "a server error": (500, "", {}),
    "too many requests": (429, "", {"Retry-After": "0"}),
    "no JSON": (200, "garbage", {}),
    "another form": (200, '{"choices": []}', {}),
    "no verdict": chat("perhaps"),
}


@pytest.mark.parametrize("name", FAIL_ONCE)
def test_a_failure_that_may_pass_is_tried_again(stub, tmp_path, name):
    server = stub(lambda _, before: chat("correct") if before else FAIL_ONCE[name])
    asked = judge_of(server, tmp_path)
    assert asked.score(episode_of(RIGHT)) == 1.0
    counts = asked.take_counts()
    is_unparsed = int(FAIL_ONCE[name][0] == 200)
    assert counts == {"calls": 2, "retries": 1, "unparsed": is_unparsed, "cache_hits": 0}


@pytest.mark.parametrize(
    ("reply", "num_calls", "message"),
    [
        ((503, "", {}), 3, r"answered HTTP 503 Service Unavailable"),
        ((400, "", {}), 1, r"answered HTTP 400 Bad Request"),
        ((401, "", {}), 1, r"HTTP 401 .*give its token: judge.token_file or A2TGPO_JUDGE_TOKEN"),
        (chat("no idea"), 3, r"sent no verdict \(judge.pattern\): 'no idea'"),
        (chat("x" * 2**21), 1, r"sent more than 1 MiB for one request"),
    ],
)
def test_without_a_verdict_the_cause_is_one_line_and_nothing_is_stored(
    stub, tmp_path, reply, num_calls, message
):
    server = stub(lambda *_: reply)
    asked = judge_of(server, tmp_path)
    for calls in (num_calls, 2 * num_calls):
        with pytest.raises(RewardError, match=message) as error:
            asked.score(episode_of(RIGHT))
        assert "\n" not in str(error.value) and len(server.asked) == calls


def test_a_hanging_judge_fails_at_its_time_limit(stub, tmp_path):
    go_on = threading.Event()
    server = stub(lambda *_: chat("correct") if go_on.wait(60) else chat(""))
    asked = judge_of(server, tmp_path, timeout_s=0.2, max_attempts=1)
    with pytest.raises(RewardError, match=r"did not answer within 0.2 s"):
        asked.score(episode_of(RIGHT))
    go_on.set()
    assert len(server.asked) == 1


def test_a_judge_that_does_not_answer_is_soon_not_asked_any_more(stub, tmp_path):
    server = stub(lambda *_: (500, "", {}))
    asked = judge_of(server, tmp_path, max_attempts=1)
    for number in range(judge.BREAK_AFTER + 5):
        with pytest.raises(RewardError):
            asked.score(episode_of(RIGHT, question=str(number)))
    assert len(server.asked) == judge.BREAK_AFTER


def test_requests_beyond_the_steps_budget_are_not_sent(stub, tmp_path):
    server = stub(lambda *_: chat("correct"))
    asked = judge_of(server, tmp_path, max_calls_per_step=1)
    assert asked.score(episode_of(RIGHT)) == 1.0
    other = episode_of(RIGHT, question="another")
    with pytest.raises(RewardError, match=r"used up \(judge.max_calls_per_step=1\)"):
        asked.score(other)
    asked.take_counts()
    assert asked.score(other) == 1.0 and len(server.asked) == 2


def test_used_up_requests_are_no_failures_of_the_server(stub, tmp_path):
    server = stub(lambda *_: chat("correct"))
    asked = judge_of(server, tmp_path, max_calls_per_step=1)
    assert asked.score(episode_of(RIGHT)) == 1.0
    for number in range(judge.BREAK_AFTER + 1):
        with pytest.raises(RewardError, match="used up"):
            asked.score(episode_of(RIGHT, question=str(number)))
    asked.take_counts()
    assert asked.score(episode_of(RIGHT, question="another")) == 1.0


def test_evaluations_neither_use_the_steps_budget_nor_change_its_counts(stub, tmp_path):
    server = stub(lambda prompt, before: chat("correct" if before or "lucid" in prompt else "perhaps"))
    asked = judge_of(server, tmp_path, max_calls_per_step=1)
    evaluated = [
        dataclasses.replace(episode_of(RIGHT, question=text), is_evaluation=True)
        for text in ("lucid one", "vague", "lucid two", "lucid one")
    ]
    trained = episode_of(RIGHT, question="lucid three")
    assert [asked.score(episode) for episode in evaluated[:2]] == [1.0] * 2
    assert asked.score(trained) == 1.0
    assert [asked.score(episode) for episode in evaluated[2:]] == [1.0] * 2
    assert len(server.asked) == 5
    assert asked.take_counts() == {"calls": 1, "retries": 0, "unparsed": 0, "cache_hits": 0}


def test_a_prompt_file_takes_fields_of_the_record_and_a_pattern_may_find_numbers(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("A2TGPO_JUDGE_TOKEN", "secret-token")
    server = stub(lambda prompt, _: chat(f"{prompt} Score: 0.5"))
    prompt = tmp_path / "prompt.txt"
    prompt.write_text('{"rubric": "{record.rubric}", "of": {record.steps}} {answer} {other}')
    asked = judge_of(server, tmp_path, prompt_file=prompt, pattern=r"score: ([\d.]+)", scores="{}")
    record = json.dumps({"rubric": "be {answer}", "steps": [1, 2]})
    assert asked.score(episode_of(RIGHT, record=record)) == 0.5
    assert not asked.needs_answers and server.tokens == {"Bearer secret-token"}
    sent = server.asked[0]["messages"][0]["content"]
    assert sent == '{"rubric": "be {answer}", "of": [1, 2]} Paris {other}'


WRONG_URLS = ("http://", "http://[::1", "http://a b/v1", "http://host:99999/v1", "host/v1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": ""}, r"judge.url is ''; allowed: an http:// or https:// address"),
        *(({"url": url}, r"judge.url is .*; allowed: an http:// or https:// address") for url in WRONG_URLS),
        ({"url": "http://me:pass@host/v1"}, r"contains a user name or password"),
        ({"model": ""}, r"judge.model is ''"),
        ({"pattern": "(a)(b)"}, r"judge.pattern .* allowed: a regular expression with one group"),
        ({"pattern": "("}, r"judge.pattern is '\('; allowed: a regular expression \(missing \)"),
        ({"scores": "{Good: 1}"}, r"judge.scores .* texts in lower case"),
        ({"timeout_s": 90}, r"reward.timeout_s is 120.0; allowed: >= judge.max_attempts x .*\(294\)"),
    ],
)
def test_a_judge_that_cannot_work_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        config_of(**({"url": "http://host/v1"} | settings), tmp_path=tmp_path)
    assert "pass@" not in str(error.value)


def test_a_prompt_without_the_answer_is_refused(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Is {question} answered?")
    config = config_of("http://host/v1", tmp_path, prompt_file=prompt)
    with pytest.raises(ConfigError, match=r"has neither \{answer\} nor \{response\}"):
        judge.build(config)
    missing = dataclasses.replace(config.judge, prompt_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"judge.prompt_file: cannot read .*none \(No such file"):
        judge.build(dataclasses.replace(config, judge=missing))
