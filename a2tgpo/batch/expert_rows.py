"""The experts that the engine chose for each token, as arrays of small integers.

A row has the ids of the experts that every layer chose for one token, [layers, chosen]. Row r of a trajectory belongs
to the token at position r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from a2tgpo.io.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The sizes of a mixture of experts that determine the shape and the dtype of a row."""

    layers: int
    chosen: int
    """Number of experts that compute each token in each layer."""
    experts: int
    """Number of experts in each layer."""

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> ExpertShape:
        """Return the shape for a model whose layers all have experts.

        Raises:
            ConfigError: if the model has no experts, so that `rollout.router_replay` has nothing to replay.
        """
        if not getattr(hf_config, "num_experts", 0):
            raise ConfigError(
                f"rollout.router_replay is true; allowed: false, since a {hf_config.model_type} model has no experts"
            )
        return cls(
            layers=hf_config.num_hidden_layers,
            chosen=hf_config.num_experts_per_tok,
            experts=hf_config.num_experts,
        )

    @property
    def dtype(self) -> np.dtype:
        """The dtype of ids: uint8 if all ids and `no_expert` fit, otherwise int16."""
        return np.dtype(np.uint8 if self.experts < 256 else np.int16)

    @property
    def no_expert(self) -> int:
        """The id that fills positions without a row. No expert has this id."""
        return int(np.iinfo(self.dtype).max)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row."""
        return self.layers * self.chosen * self.dtype.itemsize

    def encode(self, rows: np.ndarray) -> bytes:
        """Return the bytes of `rows`, [n, layers, chosen] ids of any integer type.

        Raises:
            ValueError: if the rows have another shape, if an id is not that of an expert, or if a row names an expert
                twice.
        """
        if rows.ndim != 3 or rows.shape[1:] != (self.layers, self.chosen):
            raise ValueError(f"rows of shape {rows.shape}, expected [n, {self.layers}, {self.chosen}]")
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < self.experts:
            raise ValueError(
                f"an expert {int(rows.min())} or {int(rows.max())}, expected 0 to {self.experts - 1}"
            )
        ids = np.sort(rows, axis=-1)
        if (ids[..., 1:] == ids[..., :-1]).any():
            raise ValueError("a row that names an expert twice")
        return rows.astype(self.dtype).tobytes()

    def decode(self, content: bytes) -> np.ndarray:
        """Return the rows in `content`, the concatenated results of `encode`: [n, layers, chosen], read-only."""
        return np.frombuffer(content, self.dtype).reshape(-1, self.layers, self.chosen)
