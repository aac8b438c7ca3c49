"""Embeddings of a corpus on disk, block by block: many processes fill one folder, and each may end at any time.

What a block holds follows from its number and from what the folder is for (`key.json`), so whoever makes it makes the
same: two that make one block by chance waste its time and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2tgpo.atomic_file import write_json
from a2tgpo.config.check import ConfigError
from a2tgpo.search.encoder import Encoder
from a2tgpo.search.passage import Passage

BLOCK_PASSAGES = 4096
KEY_FILE = "key.json"


class EmbeddingBlocks:
    """The blocks in `folder`, which is made if it is missing.

    Args:
        key: corpus, part and encoder, as JSON; what is there must be of the same.
        num_passages: of the corpus or its part.

    Raises:
        ConfigError: the folder holds embeddings of something else.
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
        """Passages whose blocks are there."""
        return sum(end - start for start, end in map(self.range_of, filter(self.has, range(self.num_blocks))))

    def range_of(self, number: int) -> tuple[int, int]:
        """First passage of a block, and the first behind it."""
        start = number * BLOCK_PASSAGES
        return start, min(start + BLOCK_PASSAGES, self.num_passages)

    def has(self, number: int) -> bool:
        return self._path(number).exists()

    def missing(self, *, worker: int = 0, num_workers: int = 1) -> Iterator[int]:
        """Blocks that are not there when it is their turn: this worker's own, then all others from the end."""
        own = range(worker, self.num_blocks, num_workers)
        others = (number for number in reversed(range(self.num_blocks)) if number % num_workers != worker)
        for numbers in (own, others):
            yield from (number for number in numbers if not self.has(number))

    def put(self, number: int, vectors: np.ndarray) -> None:
        """Keep a block, [passages, dim] float32; it is there in full or not at all."""
        fresh = self.folder / f".{number}.{os.uname().nodename}.{os.getpid()}"
        with open(fresh, "wb") as stream:
            np.save(stream, vectors.astype(np.float32, copy=False), allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, self._path(number))

    def read(self, number: int) -> np.ndarray:
        """[passages, dim] float32, mapped from the file."""
        return np.load(self._path(number), mmap_mode="r", allow_pickle=False)

    def sample(self, num_passages: int) -> np.ndarray:
        """[at most about num_passages, dim] float32: rows at equal distances over all blocks."""
        step = max(1, self.num_passages // num_passages)
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
                f"--out: {self.folder} holds embeddings of another corpus, part or encoder; give the options that it "
                "was begun with, another --out, or remove that folder"
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
    """Make blocks until all are there.

    Args:
        worker, num_workers: which share this process begins with.
        progress: called with the passages embedded since the last call.
    """
    for number in blocks.missing(worker=worker, num_workers=num_workers):
        start, end = blocks.range_of(number)
        blocks.put(number, encoder.passages(passages[start:end]))
        progress(end - start)
