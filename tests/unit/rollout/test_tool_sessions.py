"""Sessions of tools, without an engine. A test submits calls like a rollout, and checks which sessions stay open."""

import threading
from types import SimpleNamespace

import pytest

from a2tgpo.config.tools import CalculatorConfig
from a2tgpo.environment.tool import ToolError, Toolset, ToolUnavailableError
from a2tgpo.environment.tools.calculator import Calculator
from a2tgpo.rollout import held_calls, tool_pool, tool_sessions
from a2tgpo.rollout.tool_pool import ToolFaultError, ToolPool
from a2tgpo.trajectory import Call, Prompt

SOON_S = 30.0
NUM_SUMS = 64


class Counter:
    """A tool whose sessions add up the numbers in their calls. The sum begins at the start value in the question's
    record.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.opened, self.closed, self.calls = [], [], []
        self.gate = threading.Event()
        self.close_error = None
        self.is_out = False

    def open(self, record, question):
        if self.is_out:
            raise ToolUnavailableError("no room for a session")
        with self.lock:
            self.opened.append(question)
        return CounterSession(self, record.get("start", 0), question)

    def close(self):
        """Nothing to close except sessions."""


class CounterSession:
    def __init__(self, counter, total, question):
        self.counter, self.total, self.question = counter, total, question
        self.is_running = False

    def call(self, text):
        assert not self.is_running, "two calls at the same time"
        self.is_running = True
        with self.counter.lock:
            self.counter.calls.append((self.question, text))
        if text == "hang":
            assert self.counter.gate.wait(SOON_S)
        self.is_running = False
        if text == "fail":
            raise ToolError("not today")
        if text == "bug":
            raise KeyError("a bug")
        if text != "hang":
            self.total += int(text)
        return [str(self.total)]

    def score(self):
        return self.total / 10

    def close(self):
        assert not self.is_running, "closed during a call"
        if self.counter.close_error:
            raise self.counter.close_error
        with self.counter.lock:
            self.counter.closed.append(self.question)


@pytest.fixture
def counter():
    return Counter()


@pytest.fixture
def pool_of(counter):
    opened = []

    def pool_of(**limits):
        tools = {"counter": counter, "calculator": Calculator(CalculatorConfig())}
        opened.append(ToolPool(Toolset(tools=tools, **limits)))
        return opened[-1]

    yield pool_of
    counter.gate.set()
    for pool in opened:
        pool.close()


def prompt(name="q", record="{}"):
    return Prompt(index=0, id=name, question=name, answers=("a",), tokens=(1,), record=record)


def collect(pool, number):
    found = {}
    while len(found) < number:
        found.update({result.key: result for result in pool.results(wait=True)})
    return found


def ask(pool, sessions, *texts, tool="counter"):
    """Submit calls at the same time, and return their results in the order of the calls."""
    keys = [pool.submit(tool, text, sessions) for text in texts]
    found = collect(pool, len(keys))
    return [found[key] for key in keys]


def await_(condition):
    deadline = threading.Event()
    for _ in range(3000):
        if condition():
            return True
        deadline.wait(0.01)
    return False


def test_a_session_has_its_record_keeps_its_state_and_is_closed_at_the_end(pool_of, counter):
    pool = pool_of()
    first, second = pool.sessions_for(prompt("one", '{"start": 100}')), pool.sessions_for(prompt("two"))
    assert [result.parts for result in ask(pool, first, "1")] == [("101",)]
    assert [result.parts for result in ask(pool, second, "1")] == [("1",)]
    (answer,) = ask(pool, first, "20")
    assert (answer.parts, answer.score) == (("121",), 12.1)
    pool.end(first)
    assert pool.take_counts()["tools/open_sessions"] == 1  # the second trajectory still plays
    pool.end(second)
    assert pool.take_counts()["tools/open_sessions"] == 0
    assert sorted(counter.closed) == ["one", "two"]


def test_calls_of_one_trajectory_run_one_after_another_in_their_order(pool_of, counter):
    pool = pool_of(max_concurrent_calls=8)
    users = [pool.sessions_for(prompt(str(number))) for number in range(4)]
    keys = {pool.submit("counter", str(text), user): (user, text) for text in range(1, 9) for user in users}
    results = collect(pool, len(keys))
    for key, (_, text) in keys.items():
        assert results[key].parts == (str(text * (text + 1) // 2),)


@pytest.mark.parametrize("score", [float("nan"), "good"])
def test_a_score_that_is_no_finite_number_ends_the_run(pool_of, monkeypatch, score):
    monkeypatch.setattr(CounterSession, "score", lambda session: score)
    pool = pool_of()
    pool.submit("counter", "1", pool.sessions_for(prompt()))
    with pytest.raises(ToolFaultError, match=r"the score of its session is .*, not a finite number"):
        collect(pool, 1)


def test_a_score_that_is_no_method_ends_the_run(pool_of, monkeypatch):
    monkeypatch.setattr(CounterSession, "score", 0.5)
    pool = pool_of()
    pool.submit("counter", "1", pool.sessions_for(prompt()))
    with pytest.raises(ToolFaultError, match=r"`score` of its session is 0\.5, not a method"):
        collect(pool, 1)


@pytest.mark.parametrize("session", [None, SimpleNamespace(call=len)])
def test_a_session_without_its_methods_ends_the_run(pool_of, counter, monkeypatch, session):
    monkeypatch.setattr(counter, "open", lambda record, question: session)
    pool = pool_of()
    pool.submit("counter", "1", pool.sessions_for(prompt()))
    with pytest.raises(ToolFaultError, match=r"`open` returned .*, which has no method (call|close)"):
        collect(pool, 1)


def test_other_tools_are_called_beside_a_session_and_have_no_score(pool_of, counter):
    pool = pool_of()
    sessions = pool.sessions_for(prompt())
    running = pool.submit("counter", "hang", sessions)
    (answer,) = ask(pool, sessions, "6 * 7", tool="calculator")
    assert (answer.parts, answer.score) == (("42",), None)
    counter.gate.set()
    assert collect(pool, 1)[running].parts == ("0",)


def test_a_trajectory_that_calls_no_session_opens_none(pool_of, counter):
    pool = pool_of()
    sessions = pool.sessions_for(prompt())
    ask(pool, sessions, "1 + 1", tool="calculator")
    pool.end(sessions)
    assert pool.take_counts()["tools/open_sessions"] == 0
    assert counter.opened == []
    plain = ToolPool(Toolset(tools={"calculator": Calculator(CalculatorConfig())}))
    assert plain.sessions_for(prompt()) is None and "tools/open_sessions" not in plain.take_counts()
    plain.end(None)
    plain.close()


def test_no_session_is_left_whatever_the_order_in_which_trajectories_end(pool_of, counter):
    pool = pool_of(max_concurrent_calls=8)
    users = {number: pool.sessions_for(prompt(str(number))) for number in range(NUM_SUMS)}
    for _ in range(3):
        keys = [pool.submit("counter", "1", user) for user in users.values()]
        collect(pool, len(keys))
        for number in list(users)[:3]:
            pool.end(users.pop(number))
    for user in users.values():
        pool.end(user)
    assert pool.take_counts()["tools/open_sessions"] == 0
    assert sorted(counter.closed) == sorted(counter.opened) and len(counter.opened) == NUM_SUMS


def test_an_interruption_closes_sessions_whose_calls_run_or_wait(pool_of, counter):
    pool = pool_of(max_concurrent_calls=1)
    idle, runs, waits = (pool.sessions_for(prompt(name)) for name in ("idle", "runs", "waits"))
    ask(pool, idle, "1")
    for text in ("hang", "1"):
        pool.submit("counter", text, runs)
    pool.submit("counter", "1", waits)
    assert await_(lambda: ("runs", "hang") in counter.calls)
    pool.drop_pending()
    counter.gate.set()
    assert pool.take_counts()["tools/open_sessions"] == 0
    assert sorted(counter.closed) == ["idle", "runs"] and counter.opened == ["idle", "runs"]
    again = pool.sessions_for(prompt("again"))
    assert ask(pool, again, "5")[0].parts == ("5",)


def test_the_end_of_the_pool_closes_what_is_open(pool_of, counter):
    pool = pool_of()
    ask(pool, pool.sessions_for(prompt()), "1")
    pool.close()
    assert counter.closed == ["q"]


def test_a_replayed_session_plays_as_one_that_was_never_closed(pool_of, counter):
    pool = pool_of()
    whole = pool.sessions_for(prompt("whole", '{"start": 7}'))
    answers = ask(pool, whole, "1", "2", "3", "4")
    past = [
        Call(tool="counter", arguments="1"),
        Call(tool="calculator", arguments="1000"),
        Call(tool="counter", arguments="1000", failed=True),
        Call(
            tool="counter", arguments="1000", problem="Error: at most 2 calls a turn", problem_kind="excess"
        ),
        Call(tool="counter", arguments="2"),
    ]
    going_on = pool.sessions_for(prompt("goes on", '{"start": 7}'), past)
    results = ask(pool, going_on, "3", "4")
    assert [(r.parts, r.score) for r in results] == [(r.parts, r.score) for r in answers[2:]]


def test_a_replay_that_fails_fails_the_call_and_leaves_no_session(pool_of, counter):
    pool = pool_of()
    sessions = pool.sessions_for(prompt(), [Call(tool="counter", arguments="fail")])
    (answer,) = ask(pool, sessions, "1")
    assert answer.error == "not today"
    assert counter.closed == counter.opened == ["q"]


def test_a_hanging_call_fails_the_later_ones_and_counts_as_a_leak(pool_of, counter, monkeypatch):
    monkeypatch.setattr(tool_sessions, "CLOSE_S", 0.1)
    pool = pool_of(call_timeout_s=0.3)
    sessions, other = pool.sessions_for(prompt("hangs")), pool.sessions_for(prompt("other"))
    late, *queued = ask(pool, sessions, "hang", "1", "2")
    assert late.is_late
    assert [call.error for call in queued] == ["an earlier call of its session did not return"] * 2
    assert ask(pool, other, "1")[0].parts == ("1",)
    for user in (sessions, other):
        pool.end(user)
    assert pool.take_counts()["tools/open_sessions"] == 1
    counter.gate.set()
    assert await_(lambda: "hangs" in counter.closed)


def test_sessions_are_given_up_once_if_too_many_do_not_close(pool_of, counter, monkeypatch, caplog):
    monkeypatch.setattr(tool_sessions, "NUM_CLOSERS", 1)
    pool = pool_of(call_timeout_s=0.1)
    users = [pool.sessions_for(prompt(str(number))) for number in range(7)]
    keys = [pool.submit("counter", "hang", sessions) for sessions in users]
    assert all(result.is_late for result in collect(pool, len(keys)).values())
    for sessions in users:
        pool.end(sessions)
    assert [pool.take_counts()["tools/open_sessions"] for _ in range(2)] == [7, 0]
    assert any("give the tool session a timeout of its own" in message for message in caplog.messages)


def test_a_close_that_fails_is_warned_about_and_counted_once(pool_of, counter, caplog):
    pool = pool_of()
    counter.close_error = OSError("the disk is full")
    sessions = pool.sessions_for(prompt())
    ask(pool, sessions, "1")
    pool.end(sessions)
    assert [pool.take_counts()["tools/open_sessions"] for _ in range(2)] == [1, 0]
    assert caplog.messages == [
        "warning: a session of a tool could not be closed: counter: OSError: the disk is full"
    ]


def test_a_failed_call_keeps_the_session_and_a_bug_ends_the_run_with_its_place(pool_of, counter):
    pool = pool_of()
    sessions = pool.sessions_for(prompt())
    results = ask(pool, sessions, "1", "fail", "2")
    assert [(r.parts, r.error) for r in results] == [(("1",), None), ((), "not today"), (("3",), None)]
    pool.submit("counter", "bug", sessions)
    with pytest.raises(
        ToolFaultError, match=r"^the counter tool failed with KeyError: 'a bug' at test_tool_sess"
    ):
        collect(pool, 1)
    pool.drop_pending()
    assert pool.take_counts()["tools/open_sessions"] == 0


def test_a_session_that_cannot_open_in_an_outage_opens_once_it_is_over(pool_of, counter):
    pool = pool_of(outage_limit_s=100.0)
    counter.is_out = True
    sessions = pool.sessions_for(prompt())
    key = pool.submit("counter", "1", sessions)
    assert await_(lambda: pool.results(wait=False) == [] and pool.outage.is_on)
    counter.is_out = False
    assert collect(pool, 1)[key].parts == ("1",)


def test_an_outage_is_waited_out_asleep_with_calls_behind_a_held_one(pool_of, counter, monkeypatch):
    naps = []
    monkeypatch.setattr(tool_pool, "time", SimpleNamespace(sleep=naps.append))
    monkeypatch.setattr(held_calls, "RETRY_S", 1e9)
    pool = pool_of(outage_limit_s=100.0)
    counter.is_out = True
    sessions = pool.sessions_for(prompt())
    for text in ("1", "2"):
        pool.submit("counter", text, sessions)
    assert await_(lambda: pool.results(wait=False) == [] and pool.outage.is_on)
    assert pool.results(wait=True) == [] and naps == [tool_pool.IDLE_S]
