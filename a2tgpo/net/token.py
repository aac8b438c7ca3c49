"""Read a server's bearer token from a file or an environment variable. No message shows the token."""

import os
import re
from pathlib import Path

from a2tgpo.io.errors import ConfigError

_TOKEN = re.compile(r"[!-~]{8,4096}")


def read_token(path: str, *, key: str, variable: str) -> str | None:
    """Return the token in the file `path`, without surrounding spaces.

    If `path` is empty, return the token in the environment variable `variable`, or None if it is not set.

    Raises:
        ConfigError: with a one-line message that names `key`, if the file cannot be read or the token is not valid in
            an HTTP header.
    """
    if not path:
        token, where = os.environ.get(variable, ""), f"environment variable {variable}"
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
            f"{where}: has no token; allowed: 8 to 4096 printable ASCII characters without blanks"
        )
    return token
