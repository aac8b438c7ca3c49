"""The files of a run's recorded rollouts. Each of the D data-parallel replicas writes one file per step.

The file of replica R is `rollouts/step_N/replica_R_of_D.jsonl.zst`. Each line is a trajectory as JSON: its tokens,
their texts, and the advantage, clip scale and ratio of each turn. Unpack a step with `zstd -dc rollouts/step_N/*`.
Earlier versions wrote one file per step, `rollouts/step_N.jsonl.zst`. Such files can still be read.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import zstandard

from a2tgpo.io.atomic_file import atomic_file
from a2tgpo.io.errors import ConfigError

FOLDER = "rollouts"
_PART = re.compile(r"replica_(\d+)_of_(\d+)\.jsonl\.zst")
_STEP = re.compile(r"step_(\d+)(\.jsonl\.zst)?")
_LEVEL = 1
"""Level of zstd. zstd's default level takes several times as long as this level, and makes the files only a tenth
smaller."""

_MAX_RANGES = 6


def part_path(run_dir: Path, step: int, *, replica: int, num_replicas: int) -> Path:
    """Return the file in which a data-parallel replica records its rollouts of step `step`, counted from 1."""
    return run_dir / FOLDER / f"step_{step}" / f"replica_{replica}_of_{num_replicas}.jsonl.zst"


def write_part(records: Iterable[dict], path: Path) -> None:
    """Write `records` to the file `path` atomically, then remove old files of the same step.

    Only one record at a time is in memory. If an OSError is raised, it names `path`. The old files are from an
    attempt with another number of replicas, or from an earlier version.
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
    """Return the files of each step, in ascending order of steps. Steps that lack a file are left out."""
    found: dict[int, list[Path]] = {}
    for step, entry in step_paths(run_dir):
        files = _complete(entry) if entry.suffix == "" else [entry]
        if files and (entry.suffix == "" or step not in found):
            found[step] = files
    return dict(sorted(found.items()))


def step_paths(run_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every step, in any order. Incomplete steps are included.

    The path is a folder, or a file if an earlier version wrote the step.
    """
    folder = run_dir / FOLDER
    entries = list(folder.iterdir()) if folder.is_dir() else []
    matches = ((_STEP.fullmatch(entry.name), entry) for entry in entries)
    return [(int(match[1]), entry) for match, entry in matches if match]


def step_ranges(steps: Iterable[int]) -> str:
    """Format ascending `steps` as a text such as "100, 200, 301 to 340". If there are many ranges, leave some out."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [f"{first} to {last}" if first < last else f"{first}" for first, last in ranges]
    if len(shown) > _MAX_RANGES:
        shown = [*shown[: _MAX_RANGES - 1], "...", shown[-1]]
    return ", ".join(shown)


def read_step(files: Iterable[Path]) -> list[dict]:
    """Return the records in the files of one step, sorted by prompt and sample.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is damaged. The message is the path of the file.
    """
    records = [record for path in files for record in read_part(path)]
    with contextlib.suppress(TypeError, KeyError):  # records that another program wrote may lack these keys
        records.sort(key=lambda record: (record["prompt_index"], record["sample_index"]))
    return records


def read_part(path: Path) -> list[dict]:
    """Return the records in one file, in the order of the file. The errors are those of `read_step`."""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        lines = decompressor.decompress(path.read_bytes()).decode("utf-8").split("\n")
        # Decompressing a truncated file raises no error, so check that the end was reached.
        records = [json.loads(line) for line in lines if line] if decompressor.eof else None
    except (zstandard.ZstdError, ValueError, RecursionError):
        records = None
    if records is None:
        raise ValueError(str(path))
    return records


def _complete(folder: Path) -> list[Path]:
    """Return the files in a step's folder, in order of replicas. Return an empty list if a file is missing."""
    numbers = {}
    with contextlib.suppress(OSError):  # the folder never existed, or the run has just removed it
        numbers = {path: _numbers(path) for path in folder.iterdir()}
    parts = {found[0]: (found[1], path) for path, found in numbers.items() if found is not None}
    counts = {count for count, _ in parts.values()}
    if len(counts) != 1 or set(parts) != set(range(*counts)):
        return []
    return [parts[replica][1] for replica in range(len(parts))]


def _numbers(path: Path) -> tuple[int, int] | None:
    """Parse (replica, number of replicas) from the name of a step's file. Return None for any other file."""
    match = _PART.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else None


def read_records(files: Sequence[Path]) -> list[dict]:
    """Return the trajectories in the files of a step.

    Raises:
        ConfigError: with a one-line message, if a file cannot be read or is damaged.
    """
    try:
        return read_step(files)
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename} ({error.strerror})") from None
    except ValueError as damaged:
        raise ConfigError(f"{damaged} is damaged; give another --step") from None
