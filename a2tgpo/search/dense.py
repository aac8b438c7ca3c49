"""Dense retrieval: nearest neighbours of a query's embedding, by FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss

from a2tgpo.io.errors import ConfigError
from a2tgpo.search.encoder import Encoder
from a2tgpo.search.passage import Passage

PROBED_SHARE, LEAST_PROBED = 1 / 16, 16
"""Share and least number of an IVF index's lists to search per query, unless the index or the server sets another
number. Fewer lists find little in a small corpus (docs/retrieval.md)."""


@dataclass(frozen=True, kw_only=True)
class DenseServing:
    """How to serve a dense index; nothing here changes the files on disk."""

    encoder_path: str = ""
    """The encoder's folder on this machine; empty: its folder at build time."""
    dtype: str = "auto"
    """Dtype of the encoder, see `Encoder`."""
    num_threads: int = 1
    """Threads of FAISS, and of an encoder on a CPU."""
    on_gpus: bool = False
    """Spread the vectors over all GPUs that FAISS sees, in float16."""
    nprobe: int = 0
    """IVF lists to search per query; 0: the index's own number, or by `PROBED_SHARE`."""


class DenseIndex:
    """Finds the nearest passages by inner product of unit vectors; use from one thread at a time.

    Args:
        passages: the corpus, in the order of the embeddings.
        encoder: the encoder that embedded the passages.
        neighbours: the FAISS index over the passages.
        num_threads: threads that a search may use.
    """

    kind = "dense"

    def __init__(
        self, passages: Sequence[Passage], *, encoder: Encoder, neighbours: Any, num_threads: int = 1
    ):
        import torch

        self.passages = passages
        self._encoder = encoder
        self._neighbours = neighbours
        self._num_threads = num_threads
        torch.set_num_threads(num_threads)

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        """Return the `top_k` nearest passages of each query with their cosines, best first."""
        if not queries:
            return []
        # OpenMP's thread count is per calling thread; a new thread starts with OMP_NUM_THREADS.
        faiss.omp_set_num_threads(self._num_threads)
        scores, positions = self._neighbours.search(self._encoder.queries(queries), top_k)
        # If there are fewer than top_k passages, FAISS pads with position -1.
        return [
            [
                (self.passages[int(position)], float(score))
                for position, score in zip(found, cosines, strict=True)
                if position >= 0
            ]
            for found, cosines in zip(positions, scores, strict=True)
        ]


def open_neighbours(path: Path, serving: DenseServing, *, built_nprobe: int = 0) -> Any:
    """Open a FAISS index file, with its vectors memory-mapped or copied to the GPUs.

    Raises:
        ConfigError: GPUs are requested, but this FAISS sees none.
        RuntimeError: the file holds no index.
    """
    # IO_FLAG_MMAP maps only inverted lists; the vectors of a Flat index would be read into memory.
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if (lists := inverted_lists(index)) is not None:
        usual = max(LEAST_PROBED, round(lists.nlist * PROBED_SHARE))
        lists.nprobe = min(lists.nlist, serving.nprobe or built_nprobe or usual)
    if not serving.on_gpus:
        return index
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        raise ConfigError(
            "--gpu: this FAISS sees no GPU; allowed where nvidia-smi shows one and faiss-gpu-cu13-cuvs (or another "
            "build for GPUs) is installed instead of faiss-cpu"
        )
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, True
    return faiss.index_cpu_to_all_gpus(index, co=options)


def inverted_lists(index: Any) -> Any | None:
    """Return the IVF index within `index`; None if it has none."""
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None
