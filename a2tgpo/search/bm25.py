"""BM25 over a corpus in memory."""

import re
import unicodedata
from collections.abc import Sequence

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from a2tgpo.config.check import ConfigError
from a2tgpo.search.passage import Passage

_STOPWORDS = frozenset(STOPWORDS_EN)
_WORD = re.compile(r"\w+")


class Bm25Index:
    """Lucene-style BM25 (k1 1.5, b 0.75) over titles and texts; accents and case do not matter.

    Immutable after construction, so any number of threads may search it.

    Args:
        passages: the corpus, at least one.

    Raises:
        ConfigError: if no passage holds a word.
    """

    def __init__(self, passages: Sequence[Passage]):
        self.passages = list(passages)
        self._bm25 = bm25s.BM25(method="lucene", backend="numpy")
        words = [_tokenize(f"{passage.title} {passage.text}") for passage in self.passages]
        if not any(words):
            raise ConfigError(
                f"search.corpus: none of the {len(words)} passages holds a word; give another corpus"
            )
        self._bm25.index(words, show_progress=False)

    def search(self, query: str, top_k: int) -> list[tuple[Passage, float]]:
        """The at most `top_k` best passages with their scores, best first.

        A passage that shares no word with the query is never returned. Equal scores keep the corpus's
        order. Stop words count only where the query has nothing else.
        """
        words = _tokenize(query)
        words = [word for word in words if word not in _STOPWORDS] or words
        word_ids = self._bm25.get_tokens_ids(words)
        if not word_ids:
            return []
        scores = self._bm25.get_scores_from_ids(word_ids)  # [num_passages] float32
        found = np.flatnonzero(scores)
        if len(found) > top_k:
            # A plain top-k breaks ties as its partition happens to fall; keeping all that reach the k-th score
            # and sorting those stably keeps the corpus's order, without sorting all scores.
            threshold = np.partition(scores[found], -top_k)[-top_k]
            found = found[scores[found] >= threshold]
        best = found[np.argsort(-scores[found], kind="stable")][:top_k]
        return [(self.passages[i], float(scores[i])) for i in best]


def _tokenize(text: str) -> list[str]:
    """The words of a text, without case and accents."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    return _WORD.findall("".join(c for c in folded if not unicodedata.combining(c)))
