import gc
import random
import threading
import tracemalloc

from a2tgpo.search import answer_cache
from a2tgpo.search.answer_cache import AnswerCache
from a2tgpo.search.passage import Passage

MADE_HERE = [tracemalloc.Filter(True, name) for name in (__file__, answer_cache.__file__, "<string>")]
"""Counts only memory allocated by these files, not by threads of other tests. "<string>" is the generated code of
dataclasses.
"""


def answer(number, *, passages=3, length=500):
    """Return passages as from a corpus on disk: no two share a text object."""
    return [
        (Passage(f"{number} {i}", f"title {number}", "é" * length + str(number)), 1.0 / (i + 1))
        for i in range(passages)
    ]


def test_the_answers_used_last_are_kept_within_the_given_bytes():
    cache = AnswerCache(200_000)
    for number in range(400):
        cache.put(f"q{number}", 3, answer(number))
        assert cache.get("q0", 3) == answer(0), "it is used all the time"
    assert 190_000 < cache.num_bytes <= 200_000
    kept = [number for number in range(400) if cache.get(f"q{number}", 3) is not None]
    assert kept == [0, *range(400 - len(kept) + 1, 400)]
    assert cache.get("q399", 2) is None, "another top_k is another answer"
    assert cache.num_hits == 400 + len(kept)


def test_the_bytes_counted_are_those_taken():
    cache = AnswerCache(2**30)
    for passages, length in ((0, 0), (1, 20), (3, 700), (20, 100)):
        cache.clear()
        gc.collect()
        tracemalloc.start()
        for number in range(1000):
            cache.put(
                f"a query of some words {number}", passages, answer(number, passages=passages, length=length)
            )
        gc.collect()
        taken = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(MADE_HERE).traces)
        tracemalloc.stop()
        assert 0.6 * cache.num_bytes < taken < cache.num_bytes, (passages, length)


def test_an_answer_put_twice_counts_once_and_one_too_large_is_not_kept():
    cache = AnswerCache(10_000)
    cache.put("q", 3, answer(1))
    once = cache.num_bytes
    cache.put("q", 3, answer(1))
    assert cache.num_bytes == once
    cache.put("large", 3, answer(2, length=20_000))
    assert cache.get("large", 3) is None
    assert cache.get("q", 3) == answer(1) and cache.num_bytes == once


def test_many_threads_leave_the_count_right():
    cache = AnswerCache(50_000)

    def use(seed):
        choose = random.Random(seed)
        for _ in range(2000):
            number = choose.randrange(100)
            if cache.get(f"q{number}", 1) is None:
                cache.put(f"q{number}", 1, answer(number, passages=1))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = AnswerCache(50_000)
    for number in range(100):
        hits = cache.get(f"q{number}", 1)
        if hits is not None:
            counted.put(f"q{number}", 1, hits)
    assert cache.num_bytes == counted.num_bytes <= 50_000
