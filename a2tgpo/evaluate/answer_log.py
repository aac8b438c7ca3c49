"""Write answers to disk as they come, so that an interrupted evaluation can resume.

A folder beside the report holds `settings.json`, which identifies the evaluation, and `replica_R.jsonl`, to which
engine R appends. The next start reads all files, from any number of engines.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from a2tgpo.config.renamed import with_new_names
from a2tgpo.evaluate.evaluate import Answer
from a2tgpo.io.atomic_file import naming, write_json
from a2tgpo.io.errors import ConfigError

GREEDY, SAMPLE = "greedy", "sample"
SETTINGS = "settings.json"
SYNC_S = 10.0
"""Interval of syncs to disk, which protect against a power cut; the end of the process loses no answer in any
case.
"""
Key = tuple[str, str, str, int]
"""Data set, `GREEDY` or `SAMPLE`, question id, sample index."""


class AnswerLog:
    """Appends the answers of one engine.

    Args:
        folder: of the log; must exist.
        engine: index of the engine.
    """

    def __init__(self, folder: Path, *, engine: int):
        self._path = folder / f"replica_{engine}.jsonl"
        with naming(self._path):
            self._stream = open(self._path, "ab+")  # noqa: SIM115 (closed by `close`)
            if self._stream.tell():
                self._stream.seek(-1, os.SEEK_END)
                if self._stream.read() != b"\n":  # a killed start left half a line
                    self._stream.write(b"\n")
        self._synced = time.monotonic()

    def append(self, name: str, kind: str, answer: Answer) -> None:
        """Write one answer of data set `name`; an OSError names the file."""
        line = json.dumps(answer_record(name, kind, answer), ensure_ascii=False) + "\n"
        with naming(self._path):
            self._stream.write(line.encode())
            self._stream.flush()
            if time.monotonic() >= self._synced + SYNC_S:
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()

    def close(self) -> None:
        """Sync all answers to disk, then close."""
        with naming(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()


def open_log(folder: Path, settings: Mapping[str, Any]) -> dict[Key, Answer]:
    """Return the answers of earlier starts in `folder`, which is created if missing; call in one process.

    Args:
        folder: of the log.
        settings: everything that decides the answers, as JSON values by name.

    Raises:
        ConfigError: one line; `folder` holds answers for other settings, or cannot be read or written.
    """
    path = folder / SETTINGS
    try:
        found = {
            key: answer for file in sorted(folder.glob("replica_*.jsonl")) for key, answer in _read(file)
        }
        if not found:  # the folder may exist without answers, if an earlier start failed
            write_json(path, dict(settings))
            return found
        begun = with_new_names(json.loads(path.read_text(encoding="utf-8")))
        _require_equal(folder, begun, json.loads(json.dumps(dict(settings))))
        return found
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"--out: cannot use {folder} ({error.strerror}); choose another folder") from None
    except (ValueError, AttributeError):
        raise ConfigError(f"{path} is damaged; remove the folder to evaluate all questions again") from None


def answer_record(name: str, kind: str, answer: Answer) -> dict[str, Any]:
    """Return the JSON object of one answer of data set `name`."""
    return {"set": name, "kind": kind, **dataclasses.asdict(answer)}


def _require_equal(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted({*begun, *now}):
        if begun.get(name) != now.get(name):
            raise ConfigError(
                f"{folder} has answers of an evaluation with {name} {begun.get(name)!r:.100}, but it is now "
                f"{now.get(name)!r:.100}; restore it, choose another --out, or remove the folder"
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
