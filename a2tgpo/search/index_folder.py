"""Indices on disk: folders with index.json, offsets.npy and the index's own files.

An index can be used only with the corpus file from which it was built. index.json has the kind of the index, the
settings for queries, and fingerprints of the corpus and of the folder's other files.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from a2tgpo.io.atomic_file import atomic_folder, write_json
from a2tgpo.io.errors import ConfigError, first_line
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.corpus_file import CorpusFile, content_fingerprint
from a2tgpo.search.dense import DenseIndex, DenseServing, open_neighbours
from a2tgpo.search.encoder import Encoder, EncoderSettings
from a2tgpo.search.passage import Passage
from a2tgpo.search.words import SPLITTING

DESCRIPTION, OFFSETS, BM25_FOLDER, FAISS_FILE = "index.json", "offsets.npy", "bm25", "faiss.index"
FORMAT = 2


class SearchIndex(Protocol):
    """An index that a retrieval server can search. Many threads may use it at the same time."""

    kind: str

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        """Return the best passages of each query with their scores, best first."""


def describe(kind: str, corpus: Path, *, part: tuple[int, int], num_passages: int) -> dict[str, Any]:
    """Return the entries of index.json that every kind of index has."""
    return {
        "format": FORMAT,
        "kind": kind,
        "corpus": {"fingerprint": content_fingerprint(corpus), "name": corpus.name},
        "part": list(part),
        "passages": num_passages,
    }


@contextlib.contextmanager
def new_folder(out: Path, description: dict[str, Any], offsets: np.ndarray) -> Iterator[Path]:
    """Yield a temporary folder for an index's own files, and rename it to `out` when the `with` block ends.

    Args:
        description: all entries of index.json but `files`: those from `describe`, and those of this kind of index.
        offsets: the offsets of the passages, from `corpus_file.scan`.
    """
    with atomic_folder(out) as partial:
        yield partial
        np.save(partial / OFFSETS, offsets, allow_pickle=False)
        write_json(partial / DESCRIPTION, description | {"files": _fingerprints(partial)})


def load_index(folder: Path, corpus: Path, *, serving: DenseServing | None = None) -> tuple[SearchIndex, int]:
    """Return the index in `folder` and its number of passages. The index's files and its corpus are memory-mapped.

    Raises:
        ConfigError: with a one-line message, if the folder has no index, if the index was built from another corpus,
            or if a file is damaged.
    """
    description = _read_description(folder)
    try:
        found = content_fingerprint(corpus)
    except OSError as error:
        raise ConfigError(f"--corpus: cannot read {corpus} ({error.strerror})") from None
    expected = description["corpus"]["fingerprint"]
    if found != expected:
        raise ConfigError(
            f"--index: {folder} was built over another corpus ({description['corpus']['name']}, {expected}) than "
            f"{corpus} ({found}); give that corpus, or rebuild the index with tools/build_index.py"
        )
    try:
        # Check the files before opening any. FAISS allocates the length that a file states, so a damaged file may
        # hang the process.
        files = _fingerprints(folder)
        if changed := sorted(
            name for name in description["files"] if files.get(name) != description["files"][name]
        ):
            raise ValueError(f"{changed[0]} has changed since it was written")
        offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        passages = CorpusFile(corpus, offsets)
        if description["kind"] == "bm25":
            return Bm25Index.load(folder / BM25_FOLDER, passages), len(passages)
        serving = serving or DenseServing()
        neighbours = open_neighbours(folder / FAISS_FILE, serving, built_nprobe=description.get("nprobe", 0))
    except (OSError, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"--index: {folder} is damaged ({first_line(error):.120}); rebuild it") from None
    settings = description["encoder"] | ({"path": serving.encoder_path} if serving.encoder_path else {})
    encoder = Encoder(EncoderSettings(**settings), dtype=serving.dtype)
    index = DenseIndex(passages, encoder=encoder, neighbours=neighbours, num_threads=serving.num_threads)
    return index, len(passages)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        known = description["format"] == FORMAT and description["kind"] in ("bm25", "dense")
        known = known and {"fingerprint", "name"} <= description["corpus"].keys()
        known = known and isinstance(description["files"], dict)
        if description["kind"] == "dense":
            EncoderSettings(**description["encoder"])
        else:
            known = known and description.get("words") == SPLITTING
    except OSError as error:
        raise ConfigError(
            f"--index: cannot read {path} ({error.strerror}); make the index with tools/build_index.py"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise ConfigError(f"--index: {path} is damaged or of another version; rebuild the index")
    return description


def _fingerprints(folder: Path) -> dict[str, str]:
    """Return the fingerprint of every file in the folder except index.json."""
    return {
        str(path.relative_to(folder)): content_fingerprint(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != DESCRIPTION
    }
