"""BM25 over a corpus in memory."""

import unicodedata
from collections.abc import Sequence

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from a2tgpo.search.passage import Passage

_STOPWORDS = frozenset(STOPWORDS_EN)


class Bm25Index:
    """Lucene-style BM25 (k1 1.5, b 0.75) over titles and texts; accents and case do not matter.

    Immutable after construction, so any number of threads may search it.

    Args:
        passages: the corpus, at least one.
    """

    def __init__(self, passages: Sequence[Passage]):
        self.passages = list(passages)
        self._bm25 = bm25s.BM25(method="lucene", backend="numpy")
        tokens = _tokenize([f"{passage.title} {passage.text}" for passage in self.passages])
        self._bm25.index(tokens, show_progress=False)

    def search(self, query: str, top_k: int) -> list[tuple[Passage, float]]:
        """The at most `top_k` best passages with their scores, best first.

        A passage that shares no word with the query is never returned. Equal scores keep the corpus's
        order. Stop words count only where the query has nothing else.
        """
        words = _tokenize([query])[0]
        words = [word for word in words if word not in _STOPWORDS] or words
        word_ids = self._bm25.get_tokens_ids(words)
        if not word_ids:
            return []
        scores = self._bm25.get_scores_from_ids(word_ids)  # [num_passages] float32
        # A plain top-k breaks ties as its partition happens to fall; keeping everything that reaches the
        # k-th score and sorting that stably keeps the corpus's order, without sorting all scores.
        threshold = np.partition(scores, -top_k)[-top_k] if top_k < len(scores) else 0.0
        candidates = np.flatnonzero((scores >= threshold) & (scores > 0))
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:top_k]
        return [(self.passages[i], float(scores[i])) for i in best]


def _tokenize(texts: list[str]) -> list[list[str]]:
    folded = [
        "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        for text in texts
    ]
    return bm25s.tokenize(
        folded,
        token_pattern=r"(?u)\b\w+\b",
        stopwords=None,
        stemmer=None,
        return_ids=False,
        show_progress=False,
    )
