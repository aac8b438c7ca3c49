"""Tool calls in threads, without an engine. A test sets the clock and decides when calls return."""

import re
import threading

import pytest
from scripted_search import ScriptedSearch, toolset_of

from a2tgpo.environment.tool import ToolError, Toolset, ToolUnavailableError
from a2tgpo.lifecycle.workers import HUNG_PER_WORKER
from a2tgpo.rollout.tool_pool import ToolFaultError, ToolPool

DEADLINE_S = 10.0
SOON_S = 30.0
"""A test that waits for a thread fails after this many real seconds."""


class Clock:
    """A clock that only a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class HeldTool:
    """A tool whose calls return when the test allows it. Calls with a text in `failing` raise ToolError."""

    def __init__(self, *, failing=()):
        self._failing = failing
        self._begun, self._let, self._left = Events(), Events(), Events()
        self.num_calls = 0

    def call(self, text):
        self.num_calls += 1
        self._begun[text].set()
        assert self._let[text].wait(SOON_S)
        self._left[text].set()
        if text in self._failing:
            raise ToolError(f"no {text}")
        return [f"{text}!"]

    def close(self):
        """Nothing is held."""

    def let_go(self, *texts):
        for text in texts:
            self._let[text].set()

    def await_begin(self, *texts):
        assert all(self._begun[text].wait(SOON_S) for text in texts)

    def await_end(self, text):
        assert self._left[text].wait(SOON_S)

    def has_begun(self, text):
        return self._begun[text].is_set()


class Events(dict):
    """One event per text, created at first access."""

    def __init__(self):
        super().__init__()
        self._lock = threading.Lock()

    def __getitem__(self, text):
        with self._lock:
            return self.setdefault(text, threading.Event())


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pool_of(clock):
    opened = []

    def pool_of(tool, *, num_workers=4):
        toolset = Toolset(tools={"tool": tool}, max_concurrent_calls=num_workers, call_timeout_s=DEADLINE_S)
        opened.append((ToolPool(toolset, clock=clock), tool))
        return opened[-1][0]

    yield pool_of
    for pool, tool in opened:
        pool.close()
        if isinstance(tool, HeldTool):
            tool.let_go(*list(tool._begun))


def collect(pool, number):
    """Return the next `number` results by key, in order of arrival."""
    results = {}
    while len(results) < number:
        results.update({result.key: result for result in pool.results(wait=True)})
    return results


def submit(pool, *texts):
    return [pool.submit("tool", text) for text in texts]


def test_every_call_gets_its_own_answer_in_the_order_of_arrival(pool_of):
    tool = HeldTool(failing=["b"])
    pool = pool_of(tool)
    a, b, c = submit(pool, "a", "b", "c")
    tool.await_begin("a", "b", "c")
    arrived = []
    for text in ("c", "a", "b"):
        tool.let_go(text)
        arrived += collect(pool, 1).values()
    assert [(r.key, r.parts, r.error) for r in arrived] == [
        (c, ("c!",), None),
        (a, ("a!",), None),
        (b, (), "no b"),
    ]
    assert pool.results(wait=True) == []


def test_without_waiting_nothing_is_returned_before_it_is_there(pool_of):
    tool = HeldTool()
    pool = pool_of(tool)
    assert pool.results(wait=True) == []
    (key,) = submit(pool, "a")
    assert pool.results(wait=False) == []
    tool.let_go("a")
    assert list(collect(pool, 1)) == [key]


def test_a_call_is_given_up_at_a_deadline_from_its_own_start(pool_of, clock):
    tool = HeldTool()
    pool = pool_of(tool)
    (first,) = submit(pool, "first")
    tool.await_begin("first")
    clock.now = 6.0
    second, third = submit(pool, "second", "third")
    tool.await_begin("second", "third")
    tool.let_go("third")
    assert list(collect(pool, 1)) == [third]  # an answer to another call moves no deadline
    clock.now = DEADLINE_S
    (late,) = pool.results(wait=False)
    assert (late.key, late.error, late.is_late) == (first, "no answer within 10 s", True)
    clock.now = 6.0 + DEADLINE_S - 0.5
    assert pool.results(wait=False) == []
    clock.now += 0.5
    assert list(collect(pool, 1)) == [second]


def test_waiting_for_a_worker_uses_up_no_deadline(pool_of, clock):
    tool = HeldTool()
    pool = pool_of(tool, num_workers=1)
    texts = [str(number) for number in range(4)]
    keys = submit(pool, *texts)
    for key, text in zip(keys, texts, strict=True):
        tool.await_begin(text)
        clock.now += 0.9 * DEADLINE_S  # all of them together take far longer than one deadline
        assert pool.results(wait=False) == []
        tool.let_go(text)
        assert [(result.key, result.error) for result in collect(pool, 1).values()] == [(key, None)]


def test_a_thread_that_hangs_is_replaced_and_its_late_answer_is_dropped(pool_of, clock):
    tool = HeldTool()
    pool = pool_of(tool, num_workers=1)
    hangs, queued = submit(pool, "hangs", "queued")
    tool.await_begin("hangs")
    assert not tool.has_begun("queued")
    clock.now = DEADLINE_S
    assert list(collect(pool, 1)) == [hangs]
    tool.await_begin("queued")
    tool.let_go("hangs")
    tool.await_end("hangs")
    clock.now += DEADLINE_S - 1
    assert pool.results(wait=False) == []
    tool.let_go("queued")
    assert [(result.key, result.parts) for result in collect(pool, 1).values()] == [(queued, ("queued!",))]


def test_so_many_hanging_calls_end_the_run_and_those_that_return_make_room(pool_of, clock):
    tool = HeldTool()
    pool = pool_of(tool, num_workers=2)
    most = 2 * HUNG_PER_WORKER

    def hang(*texts):
        submit(pool, *texts)
        tool.await_begin(*texts)
        clock.now += DEADLINE_S
        assert all(result.is_late for result in collect(pool, len(texts)).values())

    for number in range(HUNG_PER_WORKER):
        hang(f"{number} a", f"{number} b")
    tool.let_go("0 a")
    while pool._workers.num_hung == most:  # until that thread has noticed
        threading.Event().wait(0.001)
    hang("in its place")
    assert pool._workers.num_hung == most
    submit(pool, "one more")
    tool.await_begin("one more")
    clock.now += DEADLINE_S
    with pytest.raises(
        ToolFaultError,
        match=rf"^{most + 1} tool calls, the latest of tool, have been running for more than 10 s",
    ):
        pool.results(wait=True)


def test_a_pool_whose_calls_were_dropped_answers_only_later_ones(pool_of, clock):
    tool = HeldTool()
    pool = pool_of(tool, num_workers=2)
    submit(pool, "ended", "runs", "queued")
    tool.await_begin("ended", "runs")
    tool.let_go("ended")
    tool.await_begin("queued")
    submit(pool, "never")
    pool.drop_pending()
    assert pool.results(wait=True) == []
    tool.let_go("runs")
    (later,) = submit(pool, "later")
    tool.let_go("later")
    assert list(collect(pool, 1)) == [later]
    assert pool.results(wait=False) == [] and not tool.has_begun("never")
    clock.now = 2 * DEADLINE_S  # "queued" still hangs: its thread is replaced, and no result is reported
    submit(pool, "x", "y")
    assert pool.results(wait=False) == []
    tool.await_begin("x", "y")


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (KeyError("a bug"), r"KeyError: 'a bug' at test_tool_pool\.py:\d+"),
        (SystemExit(3), r"SystemExit: 3 at test_tool_pool\.py:\d+"),
        (ValueError(), r"ValueError at test_tool_pool\.py:\d+"),
        ("text", r"TypeError: it returned 'text', not a list of at least one text at tool_pool\.py:\d+"),
        (None, r"TypeError: it returned None, not a list of at least one text at tool_pool\.py:\d+"),
        ([], r"TypeError: it returned \[\], not .*"),
        ([1], r"TypeError: it returned \[1\], not .*"),
    ],
)
def test_a_bug_in_a_tool_is_one_line_that_names_tool_and_place(pool_of, returned, expected):
    class Broken:
        def call(self, text):
            if isinstance(returned, BaseException):
                raise returned
            return returned

    pool = pool_of(Broken())
    submit(pool, "a")
    with pytest.raises(ToolFaultError) as raised:
        collect(pool, 1)
    assert raised.match(
        rf"^the tool tool failed with {expected}; a tool may only raise ToolError \(docs/tools\.md\)$"
    )


def test_waiting_is_measured_only_while_there_is_nothing_else_to_do(pool_of, clock):
    tool = HeldTool()
    pool = pool_of(tool)
    submit(pool, "a")
    tool.await_begin("a")
    clock.now = 3.0
    pool.results(wait=False)
    assert pool.waited_s == 0.0
    timer = threading.Timer(0.05, lambda: (setattr(clock, "now", 5.0), tool.let_go("a")))
    timer.start()
    collect(pool, 1)
    timer.join()
    assert pool.waited_s == 2.0


def test_a_search_that_fails_is_told_in_its_own_words():
    pool = ToolPool(toolset_of(ScriptedSearch(failing=["b"]), max_concurrent_calls=4))
    keys = {query: pool.submit("search", query) for query in ("a", "b")}
    results = collect(pool, 2)
    assert results[keys["a"]].parts == ("Doc 1 (Title: a) a is known.",)
    assert (results[keys["b"]].error, results[keys["b"]].is_late) == ("no route to b", False)
    pool.close()


class Service:
    """A tool whose service is unavailable while `is_out` is set. It records all calls."""

    def __init__(self):
        self.is_out = False
        self.asked = []

    def call(self, text):
        self.asked.append(text)
        if self.is_out:
            raise ToolUnavailableError("connection refused")
        return [f"{text}!"]

    def close(self):
        """Nothing is held."""


@pytest.fixture
def service_pool(clock):
    opened = []

    def service_pool(limit_s):
        toolset = Toolset(tools={"search": Service()}, max_concurrent_calls=2, outage_limit_s=limit_s)
        opened.append(ToolPool(toolset, clock=clock))
        return opened[-1], toolset.tools["search"]

    yield service_pool
    for pool in opened:
        pool.close()


def pass_time(pool, clock, seconds):
    """Look for results while the clock moves, and return them."""
    found = []
    for _ in range(seconds):
        clock.now += 1.0
        found += pool.results(wait=True)
    return found


def test_calls_in_an_outage_are_made_again_until_they_are_answered(service_pool, clock, caplog):
    pool, service = service_pool(1800.0)
    service.is_out = True
    keys = [pool.submit("search", text) for text in ("a", "b", "c")]
    assert pass_time(pool, clock, 30) == [] and pool.outage.is_on and 25 < pool.outage.seconds <= 30
    assert 9 < len(service.asked) <= 93 and set(service.asked) == {"a", "b", "c"}
    service.is_out = False
    clock.now += 1.0
    found = collect(pool, 3)
    assert {key: found[key].parts for key in keys} == {keys[0]: ("a!",), keys[1]: ("b!",), keys[2]: ("c!",)}
    assert not pool.outage.is_on and pool.outage.verdict == "" and pool.outage.total_s >= 25
    out, back = (record.getMessage() for record in caplog.records)
    assert out == (
        "warning: the search tool is out of service (connection refused); the rollout waits for it, for at most "
        "1800 s (tools.outage_limit_s)"
    )
    assert back.startswith("the search tool answers again after ")


def test_an_outage_at_its_limit_says_why_the_run_is_to_end(service_pool, clock):
    pool, service = service_pool(60.0)
    service.is_out = True
    pool.submit("search", "a")
    pass_time(pool, clock, 40)
    assert pool.outage.verdict == ""
    pass_time(pool, clock, 30)
    assert re.fullmatch(
        r"the search tool has been out of service for \d\d s \(tools.outage_limit_s\): connection refused",
        pool.outage.verdict,
    )
    pool.drop_pending()
    assert not pool.outage.is_on and pool.results(wait=True) == []


def test_an_outage_ends_the_run_at_once_or_is_told_where_nobody_waits(service_pool, clock):
    pool, service = service_pool(0.0)
    service.is_out = True
    pool.submit("search", "a")
    pass_time(pool, clock, 2)
    assert pool.outage.verdict == (
        "the search tool is out of service (tools.on_outage=stop): connection refused"
    )
    pool, service = service_pool(None)
    service.is_out = True
    key = pool.submit("search", "a")
    assert collect(pool, 1)[key].error == "connection refused" and not pool.outage.is_on
