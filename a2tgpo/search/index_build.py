"""Build an index folder: a BM25 index, or a dense index from blocks of embeddings or from a FAISS index."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from a2tgpo.io.atomic_file import atomic_file
from a2tgpo.io.errors import require
from a2tgpo.search.bm25 import Bm25Index, score_matrix
from a2tgpo.search.corpus_file import CorpusFile, content_fingerprint, scan
from a2tgpo.search.embedding_blocks import EmbeddingBlocks, embed_missing
from a2tgpo.search.encoder import Encoder, EncoderSettings
from a2tgpo.search.index_folder import BM25_FOLDER, FAISS_FILE, OFFSETS, describe, new_folder
from a2tgpo.search.neighbours_file import empty_index, import_neighbours, write_neighbours
from a2tgpo.search.passage import Passage
from a2tgpo.search.words import SPLITTING

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the items finished since the last call, and the total number of items."""


def silent(_label: str, _done: int, _total: int) -> None:
    """Ignore the progress."""


@dataclass(frozen=True, kw_only=True)
class DenseRecipe:
    """The settings with which a dense index is built."""

    encoder: EncoderSettings
    factory: str = "Flat"
    """FAISS factory string. `Flat` searches all vectors, exactly. `IVF4096,SQ8` searches only the nearest lists."""
    nprobe: int = 0
    """Number of IVF lists that a query searches; 0: the default (`dense.PROBED_SHARE`)."""
    dtype: str = "auto"
    """Dtype of the encoder during embedding (`Encoder`)."""


def build_bm25(
    corpus: Path, out: Path, *, part: tuple[int, int] = (0, 1), progress: Progress = silent
) -> int:
    """Write the BM25 index of one part of a corpus to the folder `out`, and return the number of passages.

    `part` is explained in `corpus_file.scan`.

    Raises:
        ConfigError: with a one-line message, if the corpus is malformed or `out` exists.
    """
    require_new(out)
    offsets = _scan(corpus, part, progress)
    passages = CorpusFile(corpus, offsets)
    total = len(passages)
    description = describe("bm25", corpus, part=part, num_passages=total) | {"words": SPLITTING}
    with new_folder(out, description, offsets) as partial:
        scores = score_matrix(_counted(passages, lambda: progress("indexing", 1, total)), key="--corpus")
        Bm25Index(passages, scores=scores).save(partial / BM25_FOLDER)
    return total


class DenseBuild:
    """Builds one dense index. Each process that takes part in the build has one such object.

    The embeddings stay in the folder `OUT.embeddings` until the index is written, so an interrupted build can
    continue. `part` is explained in `corpus_file.scan`.

    Raises:
        ConfigError: with a one-line message, if the corpus, encoder or factory string is unusable, or if `out`
            exists.
    """

    def __init__(
        self,
        corpus: Path,
        out: Path,
        recipe: DenseRecipe,
        *,
        part: tuple[int, int] = (0, 1),
        progress: Progress = silent,
    ):
        require_new(out)
        # Load the encoder first, so that a bad encoder is found before an hour of reading the corpus.
        self._encoder = Encoder(recipe.encoder, dtype=recipe.dtype)
        empty_index(self._encoder.dim, recipe.factory, num_passages=2**62)
        self._corpus, self._out, self._recipe, self._part = corpus, out, recipe, part
        self._progress = progress
        self._offsets = self._read_offsets()
        self._passages = CorpusFile(corpus, self._offsets)
        empty_index(self._encoder.dim, recipe.factory, num_passages=len(self._passages))
        key = {
            "corpus": content_fingerprint(corpus),
            "part": list(part),
            "encoder": dataclasses.asdict(recipe.encoder),
            "dtype": str(self._encoder.dtype),
        }
        self.blocks = EmbeddingBlocks(self._folder, key=key, num_passages=len(self._passages))
        self._keep_offsets()

    def embed(self, *, worker: int = 0, num_workers: int = 1) -> None:
        """Compute blocks until all exist, beginning with this worker's share."""
        total = len(self._passages)
        self._progress("embedding", self.blocks.num_done, total)
        embed_missing(
            self.blocks,
            self._passages,
            self._encoder,
            worker=worker,
            num_workers=num_workers,
            progress=lambda n: self._progress("embedding", n, total),
        )

    def finish(self) -> int:
        """Write the index, remove the blocks, and return the number of passages. All blocks must exist."""
        recipe = self._recipe
        description = describe("dense", self._corpus, part=self._part, num_passages=len(self._passages))
        description |= {
            "encoder": dataclasses.asdict(recipe.encoder),
            "factory": recipe.factory,
            "nprobe": recipe.nprobe,
        }
        with new_folder(self._out, description, self._offsets) as partial:
            write_neighbours(partial / FAISS_FILE, self.blocks, dim=self._encoder.dim, factory=recipe.factory)
        shutil.rmtree(self._folder)
        return len(self._passages)

    @property
    def _folder(self) -> Path:
        return self._out.with_name(f"{self._out.name}.embeddings")

    def _read_offsets(self) -> np.ndarray:
        """Return the offsets that an earlier start or another process stored, or else scan the corpus."""
        kept = (
            self._folder / f"{content_fingerprint(self._corpus)}.{OFFSETS}"
            if self._corpus.is_file()
            else None
        )
        if kept is not None and kept.exists():
            return np.load(kept, allow_pickle=False)
        return _scan(self._corpus, self._part, self._progress)

    def _keep_offsets(self) -> None:
        path = self._folder / f"{content_fingerprint(self._corpus)}.{OFFSETS}"
        if not path.exists():
            with atomic_file(path) as stream:
                np.save(stream, self._offsets, allow_pickle=False)


def import_faiss(
    source: Path, corpus: Path, out: Path, recipe: DenseRecipe, *, progress: Progress = silent
) -> int:
    """Build an index folder from a FAISS index of a corpus, and return the number of passages.

    Args:
        source: the file of the FAISS index, with all passages in the corpus's order. The folder gets a hard link to
            the file or a copy.
        recipe: names the encoder that embedded the passages. Its factory string is ignored.

    Raises:
        ConfigError: with a one-line message, if the inputs are unusable or do not fit together, or if `out` exists.
    """
    require_new(out)
    encoder = Encoder(recipe.encoder, dtype=recipe.dtype)
    offsets = _scan(corpus, (0, 1), progress)
    description = describe("dense", corpus, part=(0, 1), num_passages=len(offsets))
    description |= {
        "encoder": dataclasses.asdict(recipe.encoder),
        "factory": f"from {source.name}",
        "nprobe": recipe.nprobe,
    }
    with new_folder(out, description, offsets) as partial:
        import_neighbours(source, partial / FAISS_FILE, dim=encoder.dim, num_passages=len(offsets))
    return len(offsets)


def require_new(out: Path) -> None:
    require(not out.exists(), "--out", str(out), "a folder that does not exist yet")


def _scan(corpus: Path, part: tuple[int, int], progress: Progress) -> np.ndarray:
    size = corpus.stat().st_size if corpus.is_file() else 0
    return scan(corpus, part=part, progress=lambda n: progress("reading the corpus", n, size))


def _counted(passages: Iterable[Passage], count: Callable[[], None]) -> Iterator[Passage]:
    for passage in passages:
        yield passage
        count()
