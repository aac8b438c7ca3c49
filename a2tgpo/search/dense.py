"""Dense retrieval: nearest neighbours of a query's embedding by FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss

from a2tgpo.config.check import ConfigError
from a2tgpo.search.encoder import Encoder
from a2tgpo.search.passage import Passage

PROBED_SHARE, LEAST_PROBED = 1 / 16, 16
"""Of an IVF index's lists, searched for a query unless the index or the server says otherwise: a share, and at least
so many. Fewer find little in a small corpus (docs/retrieval.md)."""


@dataclass(frozen=True, kw_only=True)
class DenseServing:
    """How a dense index is served; nothing here changes what is on disk."""

    encoder_path: str = ""
    """Where the encoder lies on this machine; empty: where it lay at the build."""
    dtype: str = "auto"
    """Of the encoder, see `Encoder`."""
    num_threads: int = 1
    """Of FAISS and of the encoder on a CPU."""
    on_gpus: bool = False
    """Spread the vectors over all GPUs that FAISS sees, in float16."""
    nprobe: int = 0
    """Lists of an IVF index that are searched for a query; 0: as the index was built, or by `PROBED_SHARE`."""


class DenseIndex:
    """Nearest passages by inner product of unit vectors; one thread searches it at a time.

    Args:
        passages: the corpus, in the order it was embedded.
        encoder: the one that the passages were embedded with.
        neighbours: FAISS's index over them.
        num_threads: that a search may use.
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
        """The `top_k` nearest passages of each query with their cosines, best first."""
        if not queries:
            return []
        # OpenMP's number of threads is the calling thread's own; a new one has OMP_NUM_THREADS.
        faiss.omp_set_num_threads(self._num_threads)
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


def open_neighbours(path: Path, serving: DenseServing, *, built_nprobe: int = 0) -> Any:
    """FAISS's index in a file, its vectors mapped from there or copied to the GPUs.

    Raises:
        ConfigError: GPUs are wanted, and this FAISS sees none.
        RuntimeError: the file holds no index.
    """
    # IO_FLAG_MMAP maps inverted lists only, and reads the vectors of a Flat index into memory.
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if (lists := inverted_lists(index)) is not None:
        usual = max(LEAST_PROBED, round(lists.nlist * PROBED_SHARE))
        lists.nprobe = min(lists.nlist, serving.nprobe or built_nprobe or usual)
    if not serving.on_gpus:
        return index
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        raise ConfigError(
            "--gpu: this FAISS sees no GPU; allowed where nvidia-smi shows one and faiss-gpu-cu13-cuvs (or another "
            "build for GPUs) is installed in place of faiss-cpu"
        )
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, True
    return faiss.index_cpu_to_all_gpus(index, co=options)


def inverted_lists(index: Any) -> Any | None:
    """The IVF index in `index`; None if it has none."""
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None
