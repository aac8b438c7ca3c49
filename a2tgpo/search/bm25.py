"""BM25 over a corpus, built in memory or mapped from disk."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from a2tgpo.io.errors import ConfigError
from a2tgpo.search.passage import Passage
from a2tgpo.search.words import words_of

_STOPWORDS = frozenset(STOPWORDS_EN)


class Bm25Index:
    """Lucene-style BM25 (k1 1.5, b 0.75) over the words of titles and texts. Searches are thread-safe.

    Args:
        scores: the result of `score_matrix` for these passages; None: compute it now.
        key: the name of the corpus in error messages.

    Raises:
        ConfigError: with a one-line message, if no passage has a word.
    """

    kind = "bm25"

    def __init__(self, passages: Sequence[Passage], *, scores: Any = None, key: str = "search.corpus"):
        self.passages = passages
        self._bm25 = scores or score_matrix(passages, key=key)

    @classmethod
    def load(cls, folder: Path, passages: Sequence[Passage]) -> Bm25Index:
        """Return the index that `save` wrote to `folder`. Its files are memory-mapped."""
        scores = bm25s.BM25.load(folder, mmap=True, load_corpus=False, show_progress=False, verbosity=0)
        return cls(passages, scores=scores)

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads. The passages are not written."""
        self._bm25.save(folder, show_progress=False)

    def search(self, query: str, top_k: int) -> list[tuple[Passage, float]]:
        """Return at most `top_k` passages with their scores, best first. Equal scores are in corpus order.

        A passage that shares no word with the query is never returned. Stop words in a query are ignored, unless the
        query has only stop words.
        """
        words = words_of(query)
        words = [word for word in words if word not in _STOPWORDS] or words
        word_ids = self._bm25.get_tokens_ids(words)
        if not word_ids:
            return []
        scores = self._bm25.get_scores_from_ids(word_ids)  # [num_passages] float32
        found = np.flatnonzero(scores)
        if len(found) > top_k:
            # A plain top-k breaks ties arbitrarily. A stable sort of all passages with at least the k-th score keeps
            # the corpus's order in ties.
            threshold = np.partition(scores[found], -top_k)[-top_k]
            found = found[scores[found] >= threshold]
        best = found[np.argsort(-scores[found], kind="stable")][:top_k]
        return [(self.passages[int(i)], float(scores[i])) for i in best]

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        return [self.search(query, top_k) for query in queries]


def score_matrix(passages: Iterable[Passage], *, key: str) -> Any:
    """Return bm25s's matrix, which has the score of every word in every passage."""
    vocabulary: dict[str, int] = {}
    ids = [
        array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words_of(_text_of(passage))])
        for passage in passages
    ]
    if not vocabulary:
        raise ConfigError(f"{key}: none of the {len(ids)} passages has a word; give another corpus")
    scores = bm25s.BM25(method="lucene", backend="numpy")
    scores.index((ids, vocabulary), show_progress=False)
    return scores


def _text_of(passage: Passage) -> str:
    return f"{passage.title} {passage.text}"
