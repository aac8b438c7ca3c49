"""Read users' text files, which may be compressed. If a file is not UTF-8, the error says where."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from a2tgpo.io.errors import ConfigError

_READ_BYTES = 2**20
# The first bytes decide a file's format, because its name may be wrong.
_GZIP, _BZIP2, _XZ, _ZSTD, _ZIP = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
# UTF-32 comes first, because its little-endian mark begins with UTF-16's mark.
_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_UTF8_MARK = b"\xef\xbb\xbf"


@contextlib.contextmanager
def open_unpacked(path: str | Path, *, key: str) -> Iterator[io.BufferedIOBase]:
    """Yield a binary stream of the content of `path`. A gzip, bzip2, xz or zstd file is decompressed.

    Args:
        key: the configuration key or command-line option that names the file, for error messages.

    Raises:
        ConfigError: with a one-line message, if the file cannot be opened or is a ZIP archive. Reading the stream
            raises the same error if the file is damaged or truncated.
    """
    try:
        packed = open(path, "rb")  # noqa: SIM115  (closed below; only the opening belongs in this try)
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path} ({error.strerror}); give an existing file") from None
    with packed:
        try:
            head = packed.read(6)
            packed.seek(0)
            yield _unpacked(packed, head)
        except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile) as error:
            raise ConfigError(f"{key}: {path} is damaged or cut short ({error}); fetch it again") from None
        except _ZipArchive:
            raise ConfigError(f"{key}: {path} is a ZIP archive; unpack it and give the file inside") from None
        except OSError as error:
            if error.filename not in (None, str(path)):
                raise
            # For a damaged file, bz2 raises an OSError without an error number.
            reason = error.strerror or error
            raise ConfigError(f"{key}: cannot read {path} ({reason})") from None


def read_text(path: str | Path, *, key: str) -> str:
    """Return the text of a whole file. Raise `ConfigError` in the cases of `open_unpacked` and `decode`."""
    with open_unpacked(path, key=key) as stream:
        return decode(stream.read(), f"{key}: {path}")


def is_packed(path: str | Path) -> bool:
    """Return whether the file has a format that `open_unpacked` decompresses."""
    with open(path, "rb") as stream:
        head = stream.read(6)
    return head.startswith((_GZIP, _BZIP2, _XZ, _ZSTD))


def decode(raw: bytes, where: str) -> str:
    """Return the text of a whole file, without its byte order mark.

    Raises:
        ConfigError: with a one-line message that starts with `where` and gives the place, if the file is not UTF-8.
    """
    _refuse_other_encodings(raw, where)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `error.start` does not count a byte order mark.
        start = error.start + (len(_UTF8_MARK) if raw.startswith(_UTF8_MARK) else 0)
        line = raw.count(b"\n", 0, start) + 1
        raise _not_utf8(raw, start, f"{where} line {line}") from None


def decode_line(raw: bytes, where: str) -> str:
    """Return the text of one line of a file, without a byte order mark.

    Raises:
        ConfigError: with a one-line message that starts with `where` and shows the byte, if the line is not UTF-8.
    """
    _refuse_other_encodings(raw, where)
    try:
        return raw.removeprefix(_UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = len(raw) - len(raw.removeprefix(_UTF8_MARK))
        raise _not_utf8(raw, error.start + offset, where) from None


def _not_utf8(raw: bytes, start: int, where: str) -> ConfigError:
    column = start - raw.rfind(b"\n", 0, start)
    return ConfigError(
        f"{where}: not UTF-8 (byte {column} of the line is 0x{raw[start]:02x}); save the file as UTF-8, for example "
        "with iconv -f LATIN1 -t UTF-8"
    )


def _refuse_other_encodings(raw: bytes, where: str) -> None:
    encoding = next((name for mark, name in _OTHER_MARKS.items() if raw.startswith(mark)), "")
    if not encoding and b"\0" in raw:
        encoding = f"UTF-16 (byte {raw.index(0) + 1} is NUL)"
    if encoding:
        raise ConfigError(
            f"{where}: not UTF-8 but {encoding}; save the file as UTF-8, for example with iconv -f UTF-16 -t UTF-8"
        )


class _ZipArchive(Exception):
    """Raised for a ZIP archive, because it may hold several files."""


def _unpacked(packed: io.BufferedReader, head: bytes) -> io.BufferedIOBase:
    if head.startswith(_ZIP):
        raise _ZipArchive
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=packed)
    if head.startswith(_BZIP2):
        return bz2.BZ2File(packed)
    if head.startswith(_XZ):
        return lzma.LZMAFile(packed)
    if head.startswith(_ZSTD):
        return io.BufferedReader(_ZstdFile(packed), _READ_BYTES)
    return packed


class _ZstdFile(io.RawIOBase):
    """Decompresses zstd frame by frame. zstandard's own reader silently accepts a truncated file."""

    def __init__(self, packed: io.BufferedReader):
        self._packed = packed
        self._frame = self._new_frame()
        self._is_inside = False
        self._ready = b""

    @staticmethod
    def _new_frame() -> zstandard.ZstdDecompressionObj:
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()  # zstd --long=31

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            block = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_inside = self._new_frame(), False
            block = block or self._packed.read(_READ_BYTES)
            if not block:
                if self._is_inside:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._is_inside = True
            self._ready = self._frame.decompress(block)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
