"""Write each answer to disk as soon as an engine gives it, so that an interrupted evaluation can resume.

The log is a folder beside the report. Its file `settings.json` identifies the evaluation. Engine R appends its
answers to the file `replica_R.jsonl`. A resumed evaluation reads all these files, even if it has another number of
engines.
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
"""Seconds between two syncs to disk. A power cut loses the answers since the last sync."""
ADDED = {
    "reward.format_gate": True,
    "reward.names": "em",
    "reward.weights": "",
    "rollout.call_format": "auto",
    "rollout.max_calls_per_turn": 4,
    "rollout.protocol": "tags",
    "rollout.strict_format": True,
}
"""Settings that evaluations of earlier versions did not record, and the values that these evaluations used."""
Key = tuple[str, str, str, int]
"""Identifies an answer: name of the data set, `GREEDY` or `SAMPLE`, question id, sample index."""


class AnswerLog:
    """Append the answers of one engine to that engine's file.

    Args:
        folder: the folder of the log, which must exist.
        engine: index of the engine.
    """

    def __init__(self, folder: Path, *, engine: int):
        self._path = folder / f"replica_{engine}.jsonl"
        with naming(self._path):
            self._stream = open(self._path, "ab+")  # noqa: SIM115 (closed by `close`)
            if self._stream.tell():
                self._stream.seek(-1, os.SEEK_END)
                if self._stream.read() != b"\n":  # an earlier start was killed and left half a line
                    self._stream.write(b"\n")
        self._synced = time.monotonic()

    def append(self, name: str, kind: str, answer: Answer) -> None:
        """Append one answer of data set `name` to the file.

        Raises:
            OSError: if the file cannot be written. The error names the file.
        """
        line = json.dumps(answer_record(name, kind, answer), ensure_ascii=False) + "\n"
        with naming(self._path):
            self._stream.write(line.encode())
            self._stream.flush()
            if time.monotonic() >= self._synced + SYNC_S:
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()

    def close(self) -> None:
        """Sync all answers to disk, and close the file."""
        with naming(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()


def open_log(folder: Path, settings: Mapping[str, Any]) -> dict[Key, Answer]:
    """Return the answers that earlier starts of the evaluation wrote to `folder`. Create the folder if it is missing.

    Answers that a reward could not judge are left out, so that a resumed evaluation plays and judges them again. Only
    one process may call this.

    Args:
        settings: all settings that determine the answers, as JSON values by name.

    Raises:
        ConfigError: with a one-line message, if `folder` contains answers for other settings, or if it cannot be read
            or written.
    """
    path = folder / SETTINGS
    try:
        answers = [answer for file in sorted(folder.glob("replica_*.jsonl")) for answer in _read(file)]
        found = {key: answer for key, answer in answers if answer.reward_error is None}
        if not answers:  # an earlier start that failed may have left the folder without answers
            write_json(path, dict(settings))
            return found
        begun = with_new_names(json.loads(path.read_text(encoding="utf-8")))
        added = {name: value for name, value in ADDED.items() if name in settings}
        _require_equal(folder, added | begun, json.loads(json.dumps(dict(settings))))
        return found
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"--out: cannot use {folder} ({error.strerror}); choose another folder") from None
    except (ValueError, AttributeError):
        raise ConfigError(f"{path} is damaged; remove the folder to evaluate all questions again") from None


def answer_record(name: str, kind: str, answer: Answer) -> dict[str, Any]:
    """Return one answer of data set `name` as a JSON object."""
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
                continue  # the line is incomplete, so the evaluation plays this question again
            yield (name, kind, answer.question_id, answer.sample_index), answer
