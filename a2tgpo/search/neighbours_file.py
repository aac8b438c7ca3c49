"""Write a FAISS index file from embeddings on disk, without having all embeddings in memory."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from a2tgpo.io.errors import ConfigError, first_line, require
from a2tgpo.search.dense import inverted_lists
from a2tgpo.search.embedding_blocks import EmbeddingBlocks

TRAINING_PASSAGES = 1_000_000
"""Approximate upper limit of the number of passages that train an index (IVF, PQ)."""
COUNT_OFFSET = 8
"""Byte offset of the number of vectors in a Flat index's file. The header's last 8 bytes count the components of all
vectors."""


def empty_index(dim: int, factory: str, *, num_passages: int) -> Any:
    """Return the empty FAISS index that the string `factory` describes, with the cosine as its score.

    Raises:
        ConfigError: with a one-line message, if FAISS refuses the string, or if there are fewer passages than lists.
    """
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise _refused(factory, error) from None
    lists = inverted_lists(index)
    require(
        lists is None or lists.nlist <= num_passages,
        "--factory",
        factory,
        f"at most as many lists as there are passages ({num_passages})",
    )
    return index


def write_neighbours(path: Path, blocks: EmbeddingBlocks, *, dim: int, factory: str) -> None:
    """Write the FAISS index of all blocks to `path`; all blocks must exist.

    A Flat index is written block by block. Any other index is built in memory.

    Raises:
        ConfigError: with a one-line message, if there are too few passages to train the index.
        OSError: if the file cannot be written.
    """
    index = empty_index(dim, factory, num_passages=blocks.num_passages)
    if isinstance(index, faiss.IndexFlatIP):
        _write_flat(path, blocks, dim=dim)
        return
    try:
        if not index.is_trained:
            index.train(blocks.sample(TRAINING_PASSAGES))
        for number in range(blocks.num_blocks):
            index.add(np.ascontiguousarray(blocks.read(number)))
    except RuntimeError as error:
        raise _refused(factory, error) from None
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # FAISS raises this error if, for example, the disk is full
        raise OSError(errno.EIO, first_line(error), str(path)) from error


def import_neighbours(source: Path, path: Path, *, dim: int, num_passages: int) -> None:
    """Create a hard link at `path` to an existing FAISS index, or a copy if no link can be created.

    Raises:
        ConfigError: with a one-line message, if the index does not hold `num_passages` vectors of `dim` components,
            or does not score by inner product.
    """
    try:
        found = faiss.read_index(str(source), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ConfigError(f"--from-faiss: {source} cannot be read ({first_line(error):.120})") from None
    for name, value, wanted in (
        ("vectors", found.ntotal, num_passages),
        ("components", found.d, dim),
    ):
        if value != wanted:
            raise ConfigError(
                f"--from-faiss: {source} has {value} {name}; allowed: {wanted}, as the corpus and the encoder have"
            )
    if found.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ConfigError(f"--from-faiss: {source} compares by distance; allowed: by inner product")
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def _write_flat(path: Path, blocks: EmbeddingBlocks, *, dim: int) -> None:
    header = bytearray(faiss.serialize_index(faiss.IndexFlatIP(dim)).tobytes())
    header[COUNT_OFFSET : COUNT_OFFSET + 8] = blocks.num_passages.to_bytes(8, "little")
    header[-8:] = (blocks.num_passages * dim).to_bytes(8, "little")
    with open(path, "wb") as stream:
        stream.write(header)
        for number in range(blocks.num_blocks):
            stream.write(np.ascontiguousarray(blocks.read(number)).data)
    written = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    last = blocks.read(blocks.num_blocks - 1)[-1]
    is_right = written.ntotal == blocks.num_passages and np.array_equal(
        written.reconstruct(blocks.num_passages - 1), last
    )
    assert is_right, "this FAISS uses another format for Flat indices than this program"


def _refused(factory: str, error: RuntimeError) -> ConfigError:
    reason = str(error).rsplit("Error: ", 1)[-1].splitlines()[0]
    return ConfigError(f"--factory is {factory!r}, which FAISS refuses here ({reason:.120})")
