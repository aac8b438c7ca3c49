"""Searches in threads, without any engine."""

import time

import pytest
from scripted_search import ScriptedSearch, toolset_of

from a2tgpo.rollout.tool_pool import ToolPool


@pytest.fixture
def pool_of():
    pools = []

    def pool_of(search, *, num_workers=4, deadline_s=5.0):
        pools.append(ToolPool(toolset_of(search, num_workers=num_workers, deadline_s=deadline_s)))
        return pools[-1]

    yield pool_of
    for pool in pools:
        pool.close()


def collect(pool, number):
    results = {}
    while len(results) < number:
        results.update({result.key: result for result in pool.results(wait=True)})
    return results


def test_every_search_gets_its_own_answer(pool_of):
    pool = pool_of(ScriptedSearch(delays={"a": 0.2}, failing=["b"]))
    keys = {query: pool.submit("search", query) for query in ("a", "b", "c")}
    results = collect(pool, 3)
    assert results[keys["a"]].parts == ("Doc 1 (Title: a) a is known.",)
    assert results[keys["c"]].parts == ("Doc 1 (Title: c) c is known.",)
    assert (results[keys["b"]].error, results[keys["b"]].parts) == ("no route to b", ())
    assert 0 < pool.waited_s < 1


def test_without_waiting_nothing_is_returned_before_it_is_there(pool_of):
    pool = pool_of(ScriptedSearch(delays={"a": 0.3}))
    assert pool.results(wait=True) == []
    pool.submit("search", "a")
    start = time.monotonic()
    assert pool.results(wait=False) == []
    assert time.monotonic() - start < 0.2
    assert len(pool.results(wait=True)) == 1
    assert pool.results(wait=True) == []


def test_an_answer_that_comes_too_late_is_not_taken_for_another(pool_of):
    pool = pool_of(ScriptedSearch(delays={"slow": 0.9, "next": 0.5}), deadline_s=0.6)
    slow = pool.submit("search", "slow")
    (failed,) = pool.results(wait=True)
    assert (failed.key, failed.error) == (slow, "no answer within 0.6 s")
    key = pool.submit("search", "next")
    (result,) = pool.results(wait=True)  # the slow one's answer arrives meanwhile
    assert (result.key, result.error) == (key, None)
    assert result.parts == ("Doc 1 (Title: next) next is known.",)


def test_searches_queued_behind_others_are_not_late_while_answers_arrive(pool_of):
    queries = [str(i) for i in range(6)]
    pool = pool_of(ScriptedSearch(delays=dict.fromkeys(queries, 0.2)), num_workers=1, deadline_s=0.6)
    for query in queries:
        pool.submit("search", query)
    assert all(result.error is None for result in collect(pool, 6).values())


def test_faults_of_the_program_are_passed_on(pool_of):
    class Broken(ScriptedSearch):
        def search(self, query):
            raise KeyError("a bug")

    pool = pool_of(Broken())
    pool.submit("search", "a")
    with pytest.raises(KeyError, match="a bug"):
        pool.results(wait=True)
