"""Dense retrieval: find the nearest neighbours of a query's embedding with FAISS."""

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
"""By default, a query searches this share of an IVF index's lists, but at least `LEAST_PROBED` lists. Fewer lists
find little in a small corpus (docs/retrieval.md)."""


@dataclass(frozen=True, kw_only=True)
class DenseServing:
    """How to serve a dense index. The index's files do not depend on these settings."""

    encoder_path: str = ""
    """The encoder's folder on this machine; empty: the folder of the encoder with which the index was built."""
    dtype: str = "auto"
    """Dtype of the encoder (`Encoder`)."""
    num_threads: int = 1
    """Number of threads of FAISS, and of an encoder on a CPU."""
    on_gpus: bool = False
    """Whether to spread the vectors, in float16, over all GPUs that FAISS sees."""
    nprobe: int = 0
    """Number of IVF lists that a query searches. 0: the number stored in the index, or else the default."""


class DenseIndex:
    """Finds the passages whose unit vectors have the largest inner products with a query's unit vector.

    Only one thread at a time may use it. `passages` has the order of the vectors in the FAISS index `neighbours`.
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
        # OpenMP's number of threads is a setting of the calling thread. A new thread begins with OMP_NUM_THREADS.
        faiss.omp_set_num_threads(self._num_threads)
        scores, positions = self._neighbours.search(self._encoder.queries(queries), top_k)
        # If FAISS finds fewer than `top_k` passages, it fills up the result with position -1.
        return [
            [
                (self.passages[int(position)], float(score))
                for position, score in zip(found, cosines, strict=True)
                if position >= 0
            ]
            for found, cosines in zip(positions, scores, strict=True)
        ]


def open_neighbours(path: Path, serving: DenseServing, *, built_nprobe: int = 0) -> Any:
    """Return the FAISS index in a file. Its vectors are memory-mapped, or on the GPUs if `serving.on_gpus`.

    Args:
        built_nprobe: the number of IVF lists per query, as stored in the index folder; 0: none is stored.

    Raises:
        ConfigError: with a one-line message, if GPUs are requested, but FAISS sees no GPU.
        RuntimeError: if the file contains no index.
    """
    # IO_FLAG_MMAP would map only inverted lists, and read a Flat index's vectors into memory.
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
    """Return the IVF index inside `index`; None if there is none."""
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None
