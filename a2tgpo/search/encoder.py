"""Compute sentence embeddings with a Hugging Face encoder, such as e5-base-v2 or sentence-transformers' MiniLM.

For e5-base-v2, queries begin with "query:" and a space, and passages with "passage:" and a space. MiniLM needs no
prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from a2tgpo.io.errors import ConfigError, first_line, require
from a2tgpo.search.passage import Passage

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How texts become vectors. An index stores the settings, because queries must be embedded like its passages."""

    path: str
    """Hugging Face folder of the encoder."""
    query_prefix: str = ""
    passage_prefix: str = ""
    max_tokens: int = 256
    """Number of tokens to which a text is truncated."""


class Encoder:
    """Embeds texts as unit vectors, on the GPU if there is one.

    A text's vector is the mean of the last layer's outputs over the text's tokens, scaled to length 1.

    Args:
        dtype: dtype of weights and layers. `auto` is bfloat16 on a GPU that supports it, and float32 elsewhere.
            Queries and passages may have different dtypes. The dtype hardly changes a vector (cosine above 0.999).
        batch_size: number of texts that run together; None: 256 on a GPU, 64 elsewhere.

    Raises:
        ConfigError: with a one-line message, if the folder contains no encoder, or if the encoder supports fewer than
            `max_tokens` tokens.
    """

    def __init__(self, settings: EncoderSettings, *, dtype: str = "auto", batch_size: int | None = None):
        import torch
        from transformers import AutoModel, AutoTokenizer

        require(dtype in DTYPES, "--dtype", dtype, " | ".join(DTYPES))
        self.settings = settings
        folder = Path(settings.path)
        require(
            (folder / "config.json").is_file(),
            "--encoder",
            settings.path,
            "a Hugging Face folder of an encoder",
        )
        on_gpu = torch.cuda.is_available()
        # bfloat16 is slower on CPUs without bfloat16 instructions.
        fast = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
        self.dtype = fast if dtype == "auto" else getattr(torch, dtype)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder, dtype=self.dtype).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--encoder: {folder} cannot be loaded ({first_line(error):.120})") from None
        positions = getattr(self._model.config, "max_position_embeddings", None)
        require(
            positions is None or settings.max_tokens <= positions,
            "--max-tokens",
            settings.max_tokens,
            f"at most the encoder's {positions} positions",
        )
        self._batch_size = batch_size or (256 if on_gpu else 64)
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._model.to(self._device)

    @property
    def dim(self) -> int:
        return int(self._model.config.hidden_size)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return the unit vector of each query: [len(texts), dim] float32."""
        return self._embed([self.settings.query_prefix + text for text in texts])

    def passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """Return the unit vector of each passage, title and text together: [len(passages), dim] float32."""
        return self._embed([f"{self.settings.passage_prefix}{p.title} {p.text}".strip() for p in passages])

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        tokens = self._tokenizer(list(texts), truncation=True, max_length=self.settings.max_tokens)
        # Texts of similar length form a batch, because padding costs time.
        order = sorted(range(len(texts)), key=lambda i: len(tokens["input_ids"][i]))
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            vectors[chosen] = self._run(
                {name: [column[i] for i in chosen] for name, column in tokens.items()}
            )
        return vectors

    def _run(self, tokens: dict[str, list[list[int]]]) -> np.ndarray:
        import torch

        batch = self._tokenizer.pad(tokens, return_tensors="pt").to(self._device)
        with torch.no_grad():
            hidden = self._model(**batch).last_hidden_state.float()  # [batch, tokens, dim]
        mask = batch["attention_mask"][..., None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
