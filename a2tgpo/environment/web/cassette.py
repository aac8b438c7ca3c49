"""Recorded answers of web tools, one file for each request, so that a run can be repeated without the web."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import threading
from collections.abc import Mapping
from pathlib import Path

from a2tgpo.io.atomic_file import atomic_file

logger = logging.getLogger(__name__)


class Cassette:
    """A folder of recorded answers of the web. Threads, processes and machines may share it.

    Args:
        folder: folder of the answers. With an empty path, nothing is recorded or found.
    """

    def __init__(self, folder: str):
        self._folder = Path(folder) if folder else None
        self._has_warned = False

    def find(self, request: Mapping[str, object]) -> list[str] | None:
        """Return the recorded answer to `request`, or None if there is none."""
        if self._folder is None:
            return None
        try:
            record = json.loads(self._file(request).read_bytes())
        except (OSError, ValueError):
            return None
        return list(record["parts"])

    def record(self, request: Mapping[str, object], parts: list[str]) -> None:
        """Record an answer. If it cannot be written, warn once and continue."""
        if self._folder is None:
            return
        writer = f".{platform.node()}.{os.getpid()}.{threading.get_ident()}"
        content = json.dumps({"request": request, "parts": parts}, ensure_ascii=False)
        try:
            with atomic_file(self._file(request), writer=writer) as stream:
                stream.write(content.encode("utf-8", "replace"))
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("warning: web.cassette: %s; answers from now on may not be recorded", error)

    def _file(self, request: Mapping[str, object]) -> Path:
        assert self._folder is not None
        name = hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=16).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.json"
