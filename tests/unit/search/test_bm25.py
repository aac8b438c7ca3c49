import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from a2tgpo.io.errors import ConfigError
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.passage import Passage

CITIES = [
    Passage("0", "Bogotá", "Bogotá is the capital of Colombia."),
    Passage("1", "Lima", "Lima is the capital of Peru. Its currency is the sol."),
    Passage("2", "Peru", "Peru borders Colombia, Ecuador, Brazil, Bolivia and Chile."),
    Passage("3", "Group 7", "Group 7 has 7 members."),
]


def ids(index, query, top_k=3):
    return [passage.id for passage, _ in index.search(query, top_k)]


def test_best_passage_comes_first_with_falling_scores():
    index = Bm25Index(CITIES)
    hits = index.search("currency of Peru", 3)
    assert [passage.id for passage, _ in hits] == ["1", "2"]
    assert hits[0][1] > hits[1][1] > 0


def test_accents_case_and_one_letter_words_match():
    index = Bm25Index(CITIES)
    assert ids(index, "BOGOTA")[0] == "0"
    assert ids(index, "bogota\u0301")[0] == "0"
    assert ids(index, "7") == ["3"]


def test_passage_without_a_shared_word_is_never_returned():
    index = Bm25Index(CITIES)
    assert ids(index, "zebra") == []
    assert ids(index, "") == []
    assert ids(index, "?!") == []
    assert len(ids(index, "capital", top_k=100)) == 2


def test_stop_words_count_only_where_there_is_nothing_else():
    index = Bm25Index([Passage("0", "The Who", "A band."), Passage("1", "Lima", "This is the city.")])
    assert sorted(ids(index, "the")) == ["0", "1"]
    assert ids(index, "the band") == ["0"]


def test_equal_scores_keep_the_order_of_the_corpus():
    index = Bm25Index([Passage(str(i), "", "same words here") for i in range(50)] + CITIES)
    assert ids(index, "same", top_k=5) == ["0", "1", "2", "3", "4"]


def test_corpus_without_a_word_is_refused():
    with pytest.raises(ConfigError, match="none of the 2 passages has a word"):
        Bm25Index([Passage("0", "", "?!"), Passage("1", "", "...")])


def random_passages(count):
    rng = random.Random(0)
    words = ["w" + str(i) for i in range(3000)]
    return [Passage(str(i), f"t{i}", " ".join(rng.choices(words, k=60))) for i in range(count)]


def test_thousands_of_passages_index_in_seconds_and_threads_agree_with_one():
    passages = random_passages(5000)
    start = time.process_time()
    index = Bm25Index(passages)
    assert time.process_time() - start < 5
    queries = [passage.text[:40] for passage in passages[:200]]
    alone = [index.search(query, 3) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: index.search(query, 3), queries)) == alone
