"""Compute and compare checksums of files and of the tensors in them.

Torch's distributed checkpoints put many tensors into one file. The bytes of one tensor are a piece with its own
checksum. The checksum is computed while the piece is written and compared while the piece is read, so no file is read
twice.
"""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import FileSystem

from a2tgpo.parallel.collectives import all_gather_object

Piece = tuple[int, int, int]
"""The offset of a piece in its file, the length of the piece in bytes, and the CRC-32 of the piece."""


class DamagedFileError(Exception):
    """A piece of a file differs from what was written. The message names the file."""


class ChecksummingStream:
    """A file stream that starts a new piece at each call of `tell`.

    Torch calls `tell` before and after it writes each tensor, so each tensor becomes one piece.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._start = self._checksum = 0
        self.pieces: list[Piece] = []

    def write(self, data: Any) -> int:
        self._checksum = zlib.crc32(data, self._checksum)
        return self._stream.write(data)

    def tell(self) -> int:
        position = self._stream.tell()
        if position > self._start:
            self.pieces.append((self._start, position - self._start, self._checksum))
            self._start, self._checksum = position, 0
        return position

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _ChecksummingFiles(FileSystem):
    def __init__(self) -> None:
        self.pieces: dict[str, list[Piece]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb" or not str(path).endswith(torch_checkpoint.filesystem.DEFAULT_SUFFIX):
                yield stream
                return
            checked = ChecksummingStream(stream)
            yield checked
            self.pieces[Path(path).name] = checked.pieces


class CheckedWriter(torch_checkpoint.FileSystemWriter):
    """Torch's checkpoint writer, extended to record checksums and to raise the OSError that made a write fail."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._files = self.fs = _ChecksummingFiles()

    @property
    def pieces(self) -> dict[str, list[Piece]]:
        """A map from each file name to the list of pieces that this rank has written to that file."""
        return self._files.pieces

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # After a write error, closing the file raises a second error. Search the chain of errors for the write
            # error.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


class _CheckedReader(torch_checkpoint.FileSystemReader):
    """Torch's checkpoint reader, extended to compare each piece with its checksum and to read the index only once."""

    def __init__(self, folder: Path, pieces: Mapping[str, list[Piece]]):
        super().__init__(folder)
        self._expected = {
            name: {(start, size): checksum for start, size, checksum in of_file}
            for name, of_file in pieces.items()
        }
        self._index: Any = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._index is None:
            self._index = super().read_metadata(*args, **kwargs)
        return self._index

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        file.seek(sinfo.offset)
        content = file.read(sinfo.length)
        expected = self._expected.get(sinfo.relative_path, {}).get((sinfo.offset, sinfo.length))
        if zlib.crc32(content) != expected:
            raise DamagedFileError(sinfo.relative_path)
        return io.BytesIO(content)


@contextlib.contextmanager
def checked_reading(folder: Path, pieces: Mapping[str, list[Piece]]) -> Iterator[None]:
    """Make Megatron compare each piece that it reads in `folder` with the checksum of the piece.

    If a piece does not match, the reader raises `DamagedFileError`, and torch raises a CheckpointException with this
    error on all ranks.

    Args:
        folder: the only folder that Megatron may read within the context.
        pieces: maps each file name to the pieces of that file. If it is empty, Megatron compares nothing.
    """
    if not pieces:
        yield
        return
    reader = _CheckedReader(folder, pieces)
    # Megatron's loading strategy has no argument for the reader, so replace the function that creates it.
    choose = torch_strategy._get_filesystem_reader
    torch_strategy._get_filesystem_reader = lambda *_, **__: reader
    try:
        yield
    finally:
        torch_strategy._get_filesystem_reader = choose


def size_and_checksum(pieces: list[Piece]) -> tuple[int, int]:
    """Return the size in bytes of a file that consists of `pieces`, and one CRC-32 over the list `pieces`."""
    return sum(size for _, size, _ in pieces), zlib.crc32(
        json.dumps([list(piece) for piece in pieces]).encode()
    )


def describe(folder: Path, names: list[str], group: dist.ProcessGroup) -> dict[str, tuple[int, int]]:
    """Return the size in bytes and the CRC-32 of each file in `folder` that `names` lists.

    Every rank of `group` must call this. Each of these ranks reads a share of the files.

    Raises:
        OSError: on every rank, if any rank could not read a file.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine: dict[str, tuple[int, int]] | str
    try:
        mine = {name: size_and_crc(folder / name) for name in names[rank::world_size]}
    except OSError as error:
        mine = f"{error.filename} cannot be read: {error.strerror}"
    merged: dict[str, tuple[int, int]] = {}
    for part in all_gather_object(mine, group):
        if isinstance(part, str):
            raise OSError(part)
        merged.update(part)
    return {name: merged[name] for name in names}


def size_and_crc(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes and the CRC-32 of its content."""
    size = crc = 0
    # Read small blocks, because every save runs in a new thread. glibc keeps the freed memory of an ended thread in
    # the thread's arena, so larger blocks would keep megabytes allocated in every arena of the process.
    block = memoryview(bytearray(1 << 18))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            size += count
            crc = zlib.crc32(block[:count], crc)
    return size, crc
