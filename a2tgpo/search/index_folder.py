"""Indices on disk: a folder with index.json, offsets.npy and the index itself, bound to one corpus file.

index.json says the kind, the fingerprints of the corpus and of the folder's other files, and what queries need. A
folder is written beside its place and renamed: it is complete or absent.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np

from a2tgpo.atomic_file import atomic_folder, write_json
from a2tgpo.config.check import ConfigError, require
from a2tgpo.error_line import first_line
from a2tgpo.search.bm25 import Bm25Index, score_matrix
from a2tgpo.search.corpus_file import CorpusFile, fingerprint, scan
from a2tgpo.search.dense import DenseIndex, Encoder, EncoderSettings, build_neighbours
from a2tgpo.search.passage import Passage
from a2tgpo.search.words import SPLITTING

DESCRIPTION, OFFSETS, BM25_FOLDER, FAISS_FILE = "index.json", "offsets.npy", "bm25", "faiss.index"
FORMAT = 2

Progress = Callable[[str, int, int], None]
"""(what is being done, done since the last call, all of it)."""


class SearchIndex(Protocol):
    """What a retrieval server searches; safe to use from many threads."""

    kind: str

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        """The best passages of each query with their scores, best first."""


def build_index(
    corpus: Path,
    out: Path,
    *,
    encoder: EncoderSettings | None,
    factory: str = "Flat",
    part: tuple[int, int] = (0, 1),
    progress: Progress,
) -> int:
    """Write the index of a corpus, or of one part of it, to the folder `out`; returns its number of passages.

    Args:
        encoder: of a dense index; None: BM25.
        factory: FAISS's name of a dense index.
        part: see `corpus_file.scan`.

    Raises:
        ConfigError: one line; bad corpus or encoder, or `out` is there already.
    """
    require(not out.exists(), "--out", str(out), "a folder that does not exist yet")
    # Before the corpus: what is wrong with the encoder shall not be found after an hour of reading.
    embedder = None if encoder is None else Encoder(encoder)
    size = corpus.stat().st_size if corpus.is_file() else 0
    offsets = scan(corpus, part=part, progress=lambda n: progress("reading the corpus", n, size))
    passages = CorpusFile(corpus, offsets)
    description: dict[str, Any] = {
        "format": FORMAT,
        "kind": "bm25" if encoder is None else "dense",
        "corpus": {"fingerprint": fingerprint(corpus), "name": corpus.name},
        "part": list(part),
        "passages": len(passages),
    }
    with atomic_folder(out) as partial:
        if embedder is None:
            total = len(passages)
            scores = score_matrix(_counted(passages, lambda: progress("indexing", 1, total)), key="--corpus")
            Bm25Index(passages, scores=scores).save(partial / BM25_FOLDER)
            description["words"] = SPLITTING
        else:
            description |= {"encoder": dataclasses.asdict(embedder.settings), "factory": factory}
            neighbours = build_neighbours(
                passages,
                embedder,
                factory=factory,
                progress=lambda n: progress("embedding", n, len(passages)),
            )
            try:
                faiss.write_index(neighbours, str(partial / FAISS_FILE))
            except RuntimeError as error:  # for want of space, say
                raise OSError(errno.EIO, first_line(error), str(out)) from error
        np.save(partial / OFFSETS, offsets, allow_pickle=False)
        description["files"] = _fingerprints(partial)
        write_json(partial / DESCRIPTION, description)
    return len(passages)


def load_index(folder: Path, corpus: Path, *, encoder_path: str = "") -> tuple[SearchIndex, int]:
    """The index in `folder` over the corpus it was built from, memory-mapped; and its number of passages.

    Args:
        encoder_path: where a dense index's encoder lies on this machine; empty: where it lay at the build.

    Raises:
        ConfigError: one line; no index, another corpus than the one it was built from, a damaged file.
    """
    description = _read_description(folder)
    try:
        found = fingerprint(corpus)
    except OSError as error:
        raise ConfigError(f"--corpus: cannot read {corpus} ({error.strerror})") from None
    expected = description["corpus"]["fingerprint"]
    if found != expected:
        raise ConfigError(
            f"--index: {folder} was built over another corpus ({description['corpus']['name']}, {expected}) than "
            f"{corpus} ({found}); give that one, or build anew with tools/build_index.py"
        )
    try:
        # Before any is opened: FAISS makes room for whatever number it finds as a length, and waits on others.
        files = _fingerprints(folder)
        if changed := sorted(
            name for name in description["files"] if files.get(name) != description["files"][name]
        ):
            raise ValueError(f"{changed[0]} is not as it was written")
        offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        passages = CorpusFile(corpus, offsets)
        if description["kind"] == "bm25":
            return Bm25Index.load(folder / BM25_FOLDER, passages), len(passages)
        neighbours = faiss.read_index(str(folder / FAISS_FILE), faiss.IO_FLAG_MMAP)
    except (OSError, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"--index: {folder} is damaged ({first_line(error):.120}); build it anew") from None
    settings = description["encoder"] | ({"path": encoder_path} if encoder_path else {})
    index = DenseIndex(passages, encoder=Encoder(EncoderSettings(**settings)), neighbours=neighbours)
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
        raise ConfigError(f"--index: {path} is damaged or of another version; build the index anew")
    return description


def _fingerprints(folder: Path) -> dict[str, str]:
    """Of each file in the folder but the description, by name."""
    return {
        str(path.relative_to(folder)): fingerprint(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != DESCRIPTION
    }


def _counted(passages: Iterable[Passage], count: Callable[[], None]) -> Iterator[Passage]:
    for passage in passages:
        yield passage
        count()
