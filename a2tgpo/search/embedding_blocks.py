"""Embeddings of a corpus, stored on disk in blocks.

Many processes may fill one folder together, and each may end at any time. A block's content depends only on its
number and on `key.json`, so two processes that compute the same block do no harm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2tgpo.io.atomic_file import atomic_file, write_json
from a2tgpo.io.errors import ConfigError
from a2tgpo.search.encoder import Encoder
from a2tgpo.search.passage import Passage

BLOCK_PASSAGES = 4096
KEY_FILE = "key.json"


class EmbeddingBlocks:
    """The blocks in `folder`, which is created if missing.

    Args:
        key: JSON values that identify the corpus, its part and the encoder.

    Raises:
        ConfigError: with a one-line message, if the folder exists and has another key.
    """

    def __init__(self, folder: Path, *, key: dict[str, Any], num_passages: int):
        self.folder = folder
        self.num_passages = num_passages
        self._key = key | {"block_passages": BLOCK_PASSAGES, "passages": num_passages}
        self._require_key()

    @property
    def num_blocks(self) -> int:
        return -(-self.num_passages // BLOCK_PASSAGES)

    @property
    def num_done(self) -> int:
        """Number of passages in blocks that exist."""
        return sum(end - start for start, end in map(self.range_of, filter(self.has, range(self.num_blocks))))

    def range_of(self, number: int) -> tuple[int, int]:
        """Return the positions of a block's first passage and of the first passage after the block."""
        start = number * BLOCK_PASSAGES
        return start, min(start + BLOCK_PASSAGES, self.num_passages)

    def has(self, number: int) -> bool:
        return self._path(number).exists()

    def missing(self, *, worker: int = 0, num_workers: int = 1) -> Iterator[int]:
        """Yield the number of each missing block: first this worker's blocks, then all others in reverse order."""
        own = range(worker, self.num_blocks, num_workers)
        others = (number for number in reversed(range(self.num_blocks)) if number % num_workers != worker)
        for numbers in (own, others):
            yield from (number for number in numbers if not self.has(number))

    def put(self, number: int, vectors: np.ndarray) -> None:
        """Write a block atomically: its vectors, [passages, dim], as float32."""
        process = f".{os.uname().nodename}.{os.getpid()}"
        with atomic_file(self._path(number), writer=process) as stream:
            np.save(stream, vectors.astype(np.float32, copy=False), allow_pickle=False)

    def read(self, number: int) -> np.ndarray:
        """Return the vectors of a block, [passages, dim] float32, memory-mapped."""
        return np.load(self._path(number), mmap_mode="r", allow_pickle=False)

    def sample(self, num_passages: int) -> np.ndarray:
        """Return evenly spaced vectors of each block, about `num_passages` in total: [vectors, dim] float32."""
        step = max(1, -(-self.num_passages // num_passages))
        return np.concatenate([self.read(number)[::step] for number in range(self.num_blocks)])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.npy"

    def _require_key(self) -> None:
        path = self.folder / KEY_FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, self._key)
            return
        try:
            is_same = json.loads(path.read_text(encoding="utf-8")) == self._key
        except ValueError:
            is_same = False
        if not is_same:
            raise ConfigError(
                f"--out: {self.folder} has embeddings of another corpus, part or encoder; give the same options "
                "as before, another --out, or remove that folder"
            )


def embed_missing(
    blocks: EmbeddingBlocks,
    passages: Sequence[Passage],
    encoder: Encoder,
    *,
    worker: int = 0,
    num_workers: int = 1,
    progress: Callable[[int], None] = lambda num_passages: None,
) -> None:
    """Compute and write the missing blocks until all blocks exist.

    Args:
        worker, num_workers: this process begins with the blocks whose number is `worker` modulo `num_workers`.
        progress: called with the number of passages embedded since the last call.
    """
    for number in blocks.missing(worker=worker, num_workers=num_workers):
        start, end = blocks.range_of(number)
        blocks.put(number, encoder.passages(passages[start:end]))
        progress(end - start)
