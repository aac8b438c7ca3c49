"""The bearer token that a retrieval server asks for: read from a file or the environment, never shown."""

import os
import re
from pathlib import Path

from a2tgpo.config.check import ConfigError

TOKEN_VARIABLE = "A2TGPO_SEARCH_TOKEN"
_TOKEN = re.compile(r"[!-~]{8,4096}")


def read_token(path: str, *, key: str) -> str | None:
    """The token in the file `path`, without surrounding blanks; of TOKEN_VARIABLE where `path` is empty; or None.

    Args:
        path: a file that holds the token and nothing else.
        key: the configuration key or option that names it, for error messages.

    Raises:
        ConfigError: one line, without the token; unreadable file, or what it holds cannot stand in a header.
    """
    if not path:
        token, where = os.environ.get(TOKEN_VARIABLE, ""), f"environment variable {TOKEN_VARIABLE}"
        if not token:
            return None
    else:
        where = f"{key} {path}"
        try:
            token = Path(path).read_bytes().decode("ascii").strip()
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            token = ""
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{where}: holds no token; allowed: 8 to 4096 printable ASCII characters without blanks"
        )
    return token
