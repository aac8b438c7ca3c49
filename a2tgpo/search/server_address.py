"""A retrieval server's address, which is fixed or in a file that the server writes."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.web_address import is_http_address


def write_address(path: Path, url: str) -> None:
    write_text(path, f"{url}\n")


class ServerAddress:
    """The address in the file `url_file`, or `url` if no file is given.

    Raises:
        ConfigError: with a one-line message, if the file cannot be read or contains no address.
    """

    def __init__(self, url: str, url_file: str = ""):
        self._path = Path(url_file) if url_file else None
        self.url = url if self._path is None else _read(self._path)

    def has_moved(self) -> bool:
        """Read the file again, and return whether the address has changed."""
        if self._path is None:
            return False
        try:
            url = _read(self._path)
        except ConfigError:  # a server that moves has no readable file for a moment
            return False
        moved, self.url = url != self.url, url
        return moved


def _read(path: Path) -> str:
    try:
        url = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"search.url_file: cannot read {path} ({error.strerror}); start the server with --url-file {path}"
        ) from None
    except UnicodeDecodeError:
        url = ""
    if not is_http_address(url) or "@" in urlsplit(url).netloc:
        raise ConfigError(
            f"search.url_file: {path} holds {url!r:.80}; allowed: an http:// or https:// address"
        )
    return url
