"""A run's recorded rollouts: `rollouts/step_N/replica_R_of_D.jsonl.zst`, a file of each of D data-parallel replicas.

A line is a trajectory as JSON, with texts beside the tokens and, by turn, advantage, clip scale and ratio. Files of a
step can be unpacked one after another: `zstd -dc rollouts/step_N/*`. Earlier versions wrote one file a step,
`rollouts/step_N.jsonl.zst`, which is read as well.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
import zstandard

from a2tgpo.atomic_file import atomic_file

FOLDER = "rollouts"
_PART = re.compile(r"replica_(\d+)_of_(\d+)\.jsonl\.zst")
_STEP = re.compile(r"step_(\d+)(\.jsonl\.zst)?")
_LEVEL = 1
"""Of zstd: its default level takes several times as long, for files that are a tenth smaller."""


def part_path(run_dir: Path, step: int, *, replica: int, num_replicas: int) -> Path:
    """Where replica `replica` of `num_replicas` writes its trajectories of step `step`, counted from 1."""
    return run_dir / FOLDER / f"step_{step}" / f"replica_{replica}_of_{num_replicas}.jsonl.zst"


def write_part(records: Iterable[dict], path: Path) -> None:
    """Write one file, complete or not at all, holding one record at a time in memory. An OSError names `path`.

    What an earlier attempt at the step left with another number of replicas, or as one file, is then removed.
    """
    encoder = msgspec.json.Encoder()
    with (
        atomic_file(path) as stream,
        zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).stream_writer(
            stream, closefd=False
        ) as packed,
    ):
        for record in records:
            packed.write(encoder.encode(record) + b"\n")
    numbers = {part: _numbers(part) for part in path.parent.iterdir()}
    own = numbers[path]
    stale = [part for part, found in numbers.items() if found and own and found[1] != own[1]]
    for other in (*stale, path.parent.with_name(f"{path.parent.name}.jsonl.zst")):
        with contextlib.suppress(OSError):
            other.unlink(missing_ok=True)


def recorded_steps(run_dir: Path) -> dict[int, list[Path]]:
    """The files of every step that is recorded completely, ascending; a step that lacks a part is left out."""
    folder = run_dir / FOLDER
    found: dict[int, list[Path]] = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(entry.name)
        if match is None:
            continue
        files = [entry] if match[2] else _complete(entry)
        if files and (not match[2] or int(match[1]) not in found):
            found[int(match[1])] = files
    return dict(sorted(found.items()))


def read_step(files: Iterable[Path]) -> list[dict]:
    """The records in the files of one step, by prompt and sample.

    Raises:
        OSError: a file cannot be read.
        ValueError: the path of a file that is damaged.
    """
    records = [record for path in files for record in read_part(path)]
    with contextlib.suppress(
        TypeError, KeyError
    ):  # not what this program writes; the caller shows it or refuses it
        records.sort(key=lambda record: (record["prompt_index"], record["sample_index"]))
    return records


def read_part(path: Path) -> list[dict]:
    """The records in one file, in its order. Raises as `read_step`."""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        lines = decompressor.decompress(path.read_bytes()).decode("utf-8").split("\n")
        # A file cut short raises nothing.
        records = [json.loads(line) for line in lines if line] if decompressor.eof else None
    except (zstandard.ZstdError, ValueError, RecursionError):
        records = None
    if records is None:
        raise ValueError(str(path))
    return records


def _complete(folder: Path) -> list[Path]:
    """The parts of a step's folder by replica; none unless all are there."""
    numbers = {path: _numbers(path) for path in folder.iterdir()} if folder.is_dir() else {}
    parts = {found[0]: (found[1], path) for path, found in numbers.items() if found is not None}
    counts = {count for count, _ in parts.values()}
    if len(counts) != 1 or set(parts) != set(range(*counts)):
        return []
    return [parts[replica][1] for replica in range(len(parts))]


def _numbers(path: Path) -> tuple[int, int] | None:
    """(replica, number of replicas) by a part's name; None for other files."""
    match = _PART.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else None
