"""Dense retrieval: sentence embeddings by a Hugging Face encoder, nearest neighbours by FAISS.

e5-base-v2 wants "query: " before queries and "passage: " before passages; sentence-transformers' MiniLM wants
nothing. Both average the last layer over the tokens and compare by the cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from a2tgpo.config.check import ConfigError, require
from a2tgpo.error_line import first_line
from a2tgpo.search.passage import Passage

TRAINING_PASSAGES = 1_000_000
"""At most so many passages train an index that needs training (IVF, PQ)."""
BLOCK = 4096
"""Passages embedded before they go into the index."""


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How texts become vectors; written into the index, since queries must be treated as the passages were."""

    path: str
    """Hugging Face folder of the encoder."""
    query_prefix: str = ""
    passage_prefix: str = ""
    max_tokens: int = 256
    """Longer texts are cut."""


class Encoder:
    """Unit vectors of texts: mean over the tokens of the encoder's last layer; on the GPU where there is one.

    Raises:
        ConfigError: if the folder holds no encoder, or one for shorter texts than `max_tokens`.
    """

    def __init__(self, settings: EncoderSettings, *, batch_size: int = 64):
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.settings = settings
        self._batch_size = batch_size
        folder = Path(settings.path)
        require(
            (folder / "config.json").is_file(),
            "--encoder",
            settings.path,
            "a Hugging Face folder of an encoder",
        )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--encoder: {folder} cannot be loaded ({first_line(error):.120})") from None
        positions = getattr(self._model.config, "max_position_embeddings", None)
        require(
            positions is None or settings.max_tokens <= positions,
            "--max-tokens",
            settings.max_tokens,
            f"at most the encoder's {positions} positions",
        )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """[len(texts), dim] float32, each of length 1."""
        return self._embed([self.settings.query_prefix + text for text in texts])

    def passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """[len(passages), dim] float32, each of length 1; title and text together."""
        return self._embed([f"{self.settings.passage_prefix}{p.title} {p.text}".strip() for p in passages])

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        vectors = []
        for start in range(0, len(texts), self._batch_size):
            batch = self._tokenizer(
                list(texts[start : start + self._batch_size]),
                padding=True,
                truncation=True,
                max_length=self.settings.max_tokens,
                return_tensors="pt",
            ).to(self._device)
            with torch.no_grad():
                hidden = self._model(**batch).last_hidden_state  # [batch, tokens, dim]
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1).float().cpu().numpy())
        return np.concatenate(vectors)


class DenseIndex:
    """Nearest passages by inner product of unit vectors.

    Args:
        passages: the corpus, in the order it was embedded.
        encoder: the one that the passages were embedded with.
        neighbours: FAISS's index over them.
    """

    kind = "dense"

    def __init__(self, passages: Sequence[Passage], *, encoder: Encoder, neighbours: Any):
        self.passages = passages
        self._encoder = encoder
        self._neighbours = neighbours

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        """The `top_k` nearest passages of each query with their cosines, best first."""
        if not queries:
            return []
        scores, positions = self._neighbours.search(self._encoder.queries(queries), top_k)
        # Where there are fewer than top_k, FAISS fills up with position -1.
        return [
            [
                (self.passages[int(position)], float(score))
                for position, score in zip(found, cosines, strict=True)
                if position >= 0
            ]
            for found, cosines in zip(positions, scores, strict=True)
        ]


def build_neighbours(
    passages: Sequence[Passage],
    encoder: Encoder,
    *,
    factory: str = "Flat",
    progress: Callable[[int], None] = lambda num_passages: None,
) -> Any:
    """FAISS's index over the embeddings of all passages.

    Args:
        factory: FAISS's name of the index: Flat is exact; IVF4096,PQ64 is small enough for 21 million passages.
        progress: called with the passages embedded since the last call.

    Raises:
        ConfigError: if FAISS knows no such index or there are too few passages to train it.
    """
    dim = encoder.passages(passages[:1]).shape[1]
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            step = max(1, len(passages) // TRAINING_PASSAGES)
            index.train(encoder.passages([passages[i] for i in range(0, len(passages), step)]))
        for start in range(0, len(passages), BLOCK):
            block = passages[start : start + BLOCK]
            index.add(encoder.passages(block))
            progress(len(block))
    except RuntimeError as error:
        reason = str(error).rsplit("Error: ", 1)[-1].splitlines()[0]
        raise ConfigError(f"--factory is {factory!r}, which FAISS refuses here ({reason:.120})") from None
    return index
