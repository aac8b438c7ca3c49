"""Measure the time and the memory that a step needs to record its trajectories.

One replica records 1,024 trajectories of 8,192 tokens. The step waits for the values that TensorBoard shows, and for
the start of a thread that writes the file. The baseline copies all records as lists, and waits until Python's json
module and zstd level 3 have written them as one document.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import torch
import zstandard
from trajectories import make_trajectories

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.data.tokenizer import load_tokenizer
from a2tgpo.io.atomic_file import atomic_file
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.record.rollout_files import read_step, recorded_steps
from a2tgpo.record.rollout_record import as_text, to_record
from a2tgpo.record.rollout_summary import best_and_worst, gains_by_turn, gather_summaries, gather_texts
from a2tgpo.record.rollout_writer import RolloutWriter
from a2tgpo.trajectory import Trajectory

MODEL = "artifacts/models/smollm2-135m"
COUNT, TOKENS, TURNS = 1024, 8192, 6
NUM_TEXTS = 8
ROUNDS = 3


def turn_values() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(COUNT, TURNS + 1, generator=rng, dtype=torch.float64)
        for name in ("advantage", "clip_scale", "ratio")
    }


def show(trajectories: Sequence[Trajectory], tokenizer: Any, groups: ParallelGroups) -> None:
    """Compute the values that a step writes to TensorBoard about the trajectories."""
    values = turn_values()
    summaries = gather_summaries(trajectories, groups)
    gains_by_turn(summaries)
    chosen = best_and_worst(summaries, NUM_TEXTS)

    def text_of(row: int) -> str:
        return as_text(to_record(trajectories[row], values, row, tokenizer=tokenizer))

    assert len(gather_texts(chosen, trajectories, text_of, groups)) == NUM_TEXTS


def with_lists(trajectories: Sequence[Trajectory]) -> Any:
    """Return copies of the trajectories with lists of Python numbers in place of arrays."""
    copies = copy.deepcopy(list(trajectories))
    for trajectory in copies:
        for part, names in (
            (trajectory, ["prompt_tokens"]),
            *((turn, ["tokens", "rollout_logprobs", "observation_tokens"]) for turn in trajectory.turns),
        ):
            for name in names:
                setattr(part, name, getattr(part, name).tolist())
    return copies


def as_earlier(trajectories: Sequence[Trajectory], tokenizer: Any, path: Path) -> None:
    """Write the whole step to `path` as one document."""
    values, records = turn_values(), []
    for row, trajectory in enumerate(trajectories):
        record = dataclasses.asdict(trajectory)
        for column, (turn, own) in enumerate(zip(record["turns"], trajectory.turns, strict=True)):
            del turn["experts"]  # bytes, which are not recorded
            turn |= {"query": own.query, "tool": own.tool, "tool_failed": own.tool_failed}
            turn |= {name: of_all[row, column].item() for name, of_all in values.items()}
            turn["text"] = tokenizer.decode(turn["tokens"])
            turn["observation_text"] = tokenizer.decode(turn["observation_tokens"])
        record["prompt_text"] = tokenizer.decode(record["prompt_tokens"])
        records.append(record)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with atomic_file(path) as stream:
        stream.write(zstandard.ZstdCompressor(level=3, write_checksum=True).compress(lines.encode()))


def rows() -> list[measure.Row]:
    tokenizer = load_tokenizer(MODEL)
    trajectories = make_trajectories(COUNT, mean_tokens=TOKENS, max_turns=TURNS, vocab_size=len(tokenizer))
    tokens = sum(trajectory.num_tokens for trajectory in trajectories)
    lists = with_lists(trajectories)
    groups = initialize(ParallelConfig(), seed=0)
    folder = Path(tempfile.mkdtemp(prefix="record-"))
    writer = RolloutWriter(folder, replica=0, num_replicas=1, tokenizer=tokenizer)
    waited: list[float] = []

    def ours() -> None:
        start = time.perf_counter()
        show(trajectories, tokenizer, groups)
        writer.start(1, trajectories, turn_values())
        waited.append(time.perf_counter() - start)
        writer.wait()

    def write() -> None:
        writer.start(1, trajectories, turn_values())
        writer.wait()

    earlier = folder / "earlier.jsonl.zst"
    seconds = measure.interleaved(
        {"ours": ours, "earlier": lambda: as_earlier(lists, tokenizer, earlier)},
        rounds=ROUNDS,
        clock=time.perf_counter,
        warm_up=False,
    )
    files = recorded_steps(folder)[1]
    is_equal = read_step(files) == [
        json.loads(line)
        for line in zstandard.ZstdDecompressor().decompress(earlier.read_bytes()).decode().split("\n")
        if line
    ]
    sizes = [sum(path.stat().st_size for path in files), earlier.stat().st_size]
    memory = [
        measure.peak_megabytes(write),
        measure.peak_megabytes(lambda: as_earlier(lists, tokenizer, earlier)),
    ]
    shutdown()
    shutil.rmtree(folder)
    if not is_equal:
        raise RuntimeError("record: the file does not contain the original records")
    size = f"{COUNT:,} trajectories, {tokens / 1e6:.1f} M tokens"
    was = "one JSON document, written in the step"
    return [
        measure.compared(
            f"seconds that a step waits for its rollouts, {size}",
            waited,
            seconds["earlier"],
            baseline_is=was,
            unit="s",
            target=">= 100",
            note="records that are read back are equal",
        ),
        measure.compared(
            f"the same with the thread that writes beside the next step, {size}",
            seconds["ours"],
            seconds["earlier"],
            baseline_is=was,
            unit="s",
        ),
        measure.compared(
            "memory beside the trajectories",
            [memory[0] * 1e6 / tokens],
            [memory[1] * 1e6 / tokens],
            baseline_is=was,
            unit="bytes a token",
        ),
        measure.compared(
            "size on disk",
            [sizes[0] / tokens],
            [sizes[1] / tokens],
            baseline_is="zstd level 3",
            unit="bytes a token",
        ),
    ]
