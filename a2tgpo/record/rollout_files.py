"""A run's recorded rollouts: `rollouts/step_N/replica_R_of_D.jsonl.zst`, one file per data-parallel replica (D).

Each line is a trajectory as JSON: tokens, their texts, and per turn the advantage, clip scale and ratio. A step's
files can be unpacked in sequence: `zstd -dc rollouts/step_N/*`. Earlier versions wrote one file per step,
`rollouts/step_N.jsonl.zst`, which can be read too.
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
"""Level of zstd: its default takes several times as long, for files that are a tenth smaller."""

_MAX_RANGES = 6


def part_path(run_dir: Path, step: int, *, replica: int, num_replicas: int) -> Path:
    """Return the file of data-parallel replica `replica` of `num_replicas` for step `step`, counted from 1."""
    return run_dir / FOLDER / f"step_{step}" / f"replica_{replica}_of_{num_replicas}.jsonl.zst"


def write_part(records: Iterable[dict], path: Path) -> None:
    """Write one file atomically, with one record at a time in memory. An OSError names `path`.

    Then remove files of an earlier attempt at the step with another number of replicas or in one file.
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
    """Return the files of every completely recorded step, ascending; steps that lack a part are left out."""
    found: dict[int, list[Path]] = {}
    for step, entry in step_paths(run_dir):
        files = _complete(entry) if entry.suffix == "" else [entry]
        if files and (entry.suffix == "" or step not in found):
            found[step] = files
    return dict(sorted(found.items()))


def step_paths(run_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, folder, or file of an earlier version) of all steps, complete or not, in any order."""
    folder = run_dir / FOLDER
    entries = list(folder.iterdir()) if folder.is_dir() else []
    matches = ((_STEP.fullmatch(entry.name), entry) for entry in entries)
    return [(int(match[1]), entry) for match, entry in matches if match]


def step_ranges(steps: Iterable[int]) -> str:
    """Format ascending `steps` like "100, 200, 301 to 340"; of many ranges, only the first and the last."""
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
        OSError: a file cannot be read.
        ValueError: a file is damaged; its message is the path.
    """
    records = [record for path in files for record in read_part(path)]
    with contextlib.suppress(TypeError, KeyError):  # not written by this program; the caller decides
        records.sort(key=lambda record: (record["prompt_index"], record["sample_index"]))
    return records


def read_part(path: Path) -> list[dict]:
    """Return the records in one file, in order. Raises as `read_step`."""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        lines = decompressor.decompress(path.read_bytes()).decode("utf-8").split("\n")
        # Reading a truncated file would raise no error.
        records = [json.loads(line) for line in lines if line] if decompressor.eof else None
    except (zstandard.ZstdError, ValueError, RecursionError):
        records = None
    if records is None:
        raise ValueError(str(path))
    return records


def _complete(folder: Path) -> list[Path]:
    """Return the parts of a step's folder by replica; empty unless all exist."""
    numbers = {}
    with contextlib.suppress(OSError):  # no folder, or the run has just removed it
        numbers = {path: _numbers(path) for path in folder.iterdir()}
    parts = {found[0]: (found[1], path) for path, found in numbers.items() if found is not None}
    counts = {count for count, _ in parts.values()}
    if len(counts) != 1 or set(parts) != set(range(*counts)):
        return []
    return [parts[replica][1] for replica in range(len(parts))]


def _numbers(path: Path) -> tuple[int, int] | None:
    """Parse (replica, number of replicas) from a part's name; None for other files."""
    match = _PART.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else None


def read_records(files: Sequence[Path]) -> list[dict]:
    """Return the trajectories in a step's files; ConfigError (one line) if one cannot be read or is damaged."""
    try:
        return read_step(files)
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename} ({error.strerror})") from None
    except ValueError as damaged:
        raise ConfigError(f"{damaged} is damaged; give another --step") from None
