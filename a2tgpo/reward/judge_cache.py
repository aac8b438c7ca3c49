"""Store the replies of a judge in memory and on disk, by the digest of the request."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

logger = logging.getLogger(__name__)


class JudgeCache:
    """Stores replies, so that no request is sent twice. Many threads may use it at the same time.

    Args:
        folder: the folder of the files. Every process reads all files once, and appends to its own file. None:
            the replies are only in memory.
        name: name of this process's file.
    """

    def __init__(self, folder: Path | None, name: str):
        self._path = None if folder is None else folder / f"{name}.jsonl"
        self._is_first = True
        self._lock = threading.Lock()
        self._replies: dict[str, Future[str]] = {}
        self.num_hits = 0
        """Number of counted calls of `get` that sent no request."""
        for path in sorted(folder.glob("*.jsonl")) if folder is not None else ():
            self._read(path)

    def get(self, key: str, ask: Callable[[], str], *, is_counted: bool = True) -> str:
        """Return the reply with the digest `key`. If no such reply is stored, call `ask`, and store its result.

        If several threads want the same reply, only one of them calls `ask`. If `ask` raises an exception, all these
        threads raise it, and nothing is stored.

        Args:
            is_counted: whether `num_hits` counts this call if it sends no request.
        """
        with self._lock:
            waiting = self._replies.get(key)
            self.num_hits += is_counted and waiting is not None
            if waiting is None:
                mine: Future[str] = Future()
                self._replies[key] = mine
        if waiting is not None:
            return waiting.result()
        try:
            reply = ask()
        except BaseException as error:
            with self._lock:
                del self._replies[key]
            mine.set_exception(error)
            raise
        mine.set_result(reply)
        self._append(key, reply)
        return reply

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                stored = json.loads(line)
            except (ValueError, RecursionError):  # half a line of a process that was killed
                continue
            match stored:
                case [str() as key, str() as reply]:
                    found: Future[str] = Future()
                    found.set_result(reply)
                    self._replies[key] = found

    def _append(self, key: str, reply: str) -> None:
        if self._path is None:
            return
        line = json.dumps([key, reply]).encode() + b"\n"
        with self._lock:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._path, "ab") as stream:
                    # The last line may be half a line of a process that was killed.
                    is_after_others = self._is_first and stream.tell() > 0
                    stream.write(b"\n" * is_after_others + line)
                self._is_first = False
            except OSError as error:
                logger.warning("could not store a judge's reply: %s (%s)", error.strerror, self._path)
