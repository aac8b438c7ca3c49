"""Answers on disk as they come, so that an evaluation that ended early goes on where it was.

A folder beside the report holds `settings.json`, which says whose answers they are, and `replica_R.jsonl`, to which
engine replica R appends. The next start reads all of them, however many replicas there were.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from a2tgpo.atomic_file import naming, write_json
from a2tgpo.config.check import ConfigError
from a2tgpo.evaluate.evaluate import Answer

GREEDY, SAMPLE = "greedy", "sample"
SETTINGS = "settings.json"
SYNC_S = 10.0
"""Between two writes that survive a power cut; what has ended survives the end of the process at once."""
Key = tuple[str, str, str, int]
"""Data set, `GREEDY` or `SAMPLE`, question id, sample index."""


class AnswerLog:
    """Appends the answers of one replica.

    Args:
        folder: of the log; it is there.
        replica: number of this replica.
    """

    def __init__(self, folder: Path, *, replica: int):
        self._path = folder / f"replica_{replica}.jsonl"
        with naming(self._path):
            self._stream = open(self._path, "ab+")  # noqa: SIM115 (closed by `close`)
            if self._stream.tell():
                self._stream.seek(-1, os.SEEK_END)
                if self._stream.read() != b"\n":  # a start that was killed wrote half a line
                    self._stream.write(b"\n")
        self._synced = time.monotonic()

    def append(self, name: str, kind: str, answer: Answer) -> None:
        """Write one answer of data set `name`; OSError that names the file if it cannot be written."""
        line = json.dumps(answer_record(name, kind, answer), ensure_ascii=False) + "\n"
        with naming(self._path):
            self._stream.write(line.encode())
            self._stream.flush()
            if time.monotonic() >= self._synced + SYNC_S:
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()

    def close(self) -> None:
        """Make all of it survive a power cut."""
        with naming(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()


def open_log(folder: Path, settings: Mapping[str, Any]) -> dict[Key, Answer]:
    """The answers that earlier starts have left in `folder`, which is made if it is missing; for one process.

    Args:
        folder: of the log.
        settings: JSON values by name, of everything that decides the answers.

    Raises:
        ConfigError: one line; `folder` holds answers under other settings, or cannot be read or written.
    """
    path = folder / SETTINGS
    try:
        found = {
            key: answer for file in sorted(folder.glob("replica_*.jsonl")) for key, answer in _read(file)
        }
        if not found:  # also where an earlier start failed before its first answer
            write_json(path, dict(settings))
            return found
        begun = json.loads(path.read_text(encoding="utf-8"))
        _require_equal(folder, begun, json.loads(json.dumps(dict(settings))))
        return found
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"--out: cannot use {folder} ({error.strerror}); choose another folder") from None
    except (ValueError, AttributeError):
        raise ConfigError(f"{path} is damaged; remove the folder to ask every question anew") from None


def answer_record(name: str, kind: str, answer: Answer) -> dict[str, Any]:
    """The JSON object of one answer of data set `name`."""
    return {"set": name, "kind": kind, **dataclasses.asdict(answer)}


def _require_equal(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted({*begun, *now}):
        if begun.get(name) != now.get(name):
            raise ConfigError(
                f"{folder} holds answers of an evaluation with {name} {begun.get(name)!r:.100}, now it is "
                f"{now.get(name)!r:.100}; set it back, choose another --out, or remove the folder"
            )


def _read(file: Path) -> Iterator[tuple[Key, Answer]]:
    with open(file, "rb") as stream:
        for line in stream:
            try:
                record = json.loads(line)
                name, kind = record.pop("set"), record.pop("kind")
                answer = Answer(**record | {"golds": tuple(record["golds"])})
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # half a line: its question is asked again
            yield (name, kind, answer.question_id, answer.sample_index), answer
