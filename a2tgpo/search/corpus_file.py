"""Read passages on demand from a JSONL corpus that is too large for memory."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.json_lines import parse_line
from a2tgpo.io.text_file import is_packed
from a2tgpo.search.corpus import parse_passage
from a2tgpo.search.passage import Passage

WHOLE_BYTES = 256 * 2**20
"""Largest size of a file that is hashed in full."""
NUM_BLOCKS, BLOCK_BYTES = 4096, 4096


def content_fingerprint(path: str | Path) -> str:
    """Return a fingerprint of a file's size and content, in well under a second.

    Of a file above `WHOLE_BYTES`, only 4,096 evenly spaced blocks of 4 KiB are hashed. The fingerprint recognises
    another corpus, but not an edit between two blocks that keeps the file's size.
    """
    size = os.stat(path).st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as stream:
        if size <= WHOLE_BYTES:
            while block := stream.read(2**20):
                digest.update(block)
        else:
            for start in np.linspace(0, size - BLOCK_BYTES, NUM_BLOCKS).astype(np.int64).tolist():
                stream.seek(start)
                digest.update(stream.read(BLOCK_BYTES))
    return f"{size}-{digest.hexdigest()}"


class CorpusFile(Sequence[Passage]):
    """The passages of a JSONL file in Search-R1's format. A passage is read when it is requested. Reads are
    thread-safe.

    Args:
        offsets: [num_passages] int64, the byte where each passage's line starts, from `scan`.
    """

    def __init__(self, path: str | Path, offsets: np.ndarray):
        self.path = Path(path)
        self.offsets = offsets
        with open(path, "rb") as stream:
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> Passage: ...

    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...

    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self.offsets[index])
        end = self._bytes.find(b"\n", start)
        line = self._bytes[start : end if end >= 0 else None]
        where = f"{self.path} byte {start}"
        with contextlib.suppress(ConfigError):
            if (record := parse_line(line, where)) is not None:
                return parse_passage(record, where)
        raise ConfigError(f"{where}: not the line that was indexed; rebuild the index")


def scan(
    path: str | Path,
    *,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] = lambda num_bytes: None,
    key: str = "--corpus",
) -> np.ndarray:
    """Check every line of one part of a corpus, and return the byte offsets of its passages: [num_passages] int64.

    Args:
        part: (i, n) selects the passages whose position is i modulo n. (0, 1) selects all passages.
        progress: called with the number of bytes read since the last call.

    Raises:
        ConfigError: with a one-line message, if the file cannot be read or is compressed, or if a line is invalid.
    """
    offsets: list[int] = []
    # The ids of 21 million passages would take more memory than the index, so keep only their hashes.
    seen: set[int] = set()
    number = 0
    for where, start, line in _lines(path, key):
        progress(len(line))
        if not line.strip():
            continue
        number += 1
        if (number - 1) % part[1] != part[0]:
            continue
        record = parse_line(line, where)
        if record is None:
            continue
        passage = parse_passage(record, where)
        name = int.from_bytes(hashlib.blake2b(passage.id.encode(), digest_size=8).digest())
        if name in seen:
            raise ConfigError(f"{where}: id {passage.id!r} occurs twice; ids must be unique")
        seen.add(name)
        offsets.append(start)
    if number and not offsets:
        raise ConfigError(
            f"--part is {part[0]}/{part[1]}; allowed: at most as many parts as {path} has passages ({number})"
        )
    if not offsets:
        raise ConfigError(f"{key}: {path} has no passage; give a corpus with at least one")
    return np.array(offsets, dtype=np.int64)


def _lines(path: str | Path, key: str) -> Iterator[tuple[str, int, bytes]]:
    try:
        if is_packed(path):
            raise ConfigError(
                f"{key}: {path} is compressed, but passages are read by their position; unpack it first (gunzip, "
                "bunzip2, unxz or unzstd)"
            )
        with open(path, "rb") as stream:
            start = 0
            for number, line in enumerate(stream, start=1):
                yield f"{path} line {number}", start, line
                start += len(line)
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path} ({error.strerror}); give an existing JSONL file"
        ) from None
