"""A step's trajectories on one rank: for the file, the histograms and the texts shown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import zstandard
from transformers import PreTrainedTokenizerBase

from a2tgpo.atomic_file import atomic_file
from a2tgpo.parallel.collectives import exchange_bytes
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import Trajectory


def collect_records(
    trajectories: Sequence[Trajectory],
    turn_values: Mapping[str, torch.Tensor],
    *,
    groups: ParallelGroups,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict]:
    """All replicas' trajectories on rank 0, with their turns' values and texts; [] elsewhere.

    Every rank must call this.

    Args:
        trajectories: this replica's share.
        turn_values: [N, T + 1] by name, rows as the trajectories; what is not finite becomes None.
    """
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    records = []
    if groups.is_replica_first:
        for row, trajectory in enumerate(trajectories):
            record = trajectory.to_dict()
            for column, turn in enumerate(record["turns"]):
                for name, values in turn_values.items():
                    value = values[row, column].item()
                    turn[name] = value if math.isfinite(value) else None
                turn["text"] = tokenizer.decode(turn["tokens"])
                turn["observation_text"] = tokenizer.decode(turn["observation_tokens"])
            record["prompt_text"] = tokenizer.decode(record["prompt_tokens"])
            records.append(record)
    payloads = [b""] * groups.world_size
    payloads[0] = msgspec.msgpack.encode(records) if records else b""
    received = [msgspec.msgpack.decode(part) for part in exchange_bytes(payloads, world) if part]
    collected = [record for part in received for record in part]
    return sorted(collected, key=lambda record: (record["prompt_index"], record["sample_index"]))


def write_records(records: Sequence[dict], path: Path) -> None:
    """One JSON object a line, zstd-compressed; complete or absent. An OSError names `path`."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with atomic_file(path) as stream:
        stream.write(zstandard.ZstdCompressor(level=3, write_checksum=True).compress(lines.encode()))


def gains_by_turn(records: Sequence[dict]) -> dict[int, list[float]]:
    """Every computed gain of the step, by turn index from 1."""
    gains: dict[int, list[float]] = {}
    for record in records:
        process_turns = [turn for turn in record["turns"] if turn["query"] is not None]
        for turn_index, turn in enumerate(process_turns, start=1):
            if turn["info_gain"] is not None:
                gains.setdefault(turn_index, []).append(turn["info_gain"])
    return dict(sorted(gains.items()))


def best_and_worst(records: Sequence[dict], count: int) -> dict[str, dict]:
    """`count` of the records, by name: the best (best_0, ...) and the worst (worst_0, ...) in reward, then in gain.

    Where there are not enough records no one is shown twice.
    """

    def worth(record: dict) -> tuple[float, float]:
        return record["outcome_reward"], sum(turn["info_gain"] or 0.0 for turn in record["turns"])

    ordered = sorted(records, key=worth, reverse=True)
    num_best = min((count + 1) // 2, len(ordered))
    num_worst = min(count // 2, len(ordered) - num_best)
    named = {f"best_{i}": record for i, record in enumerate(ordered[:num_best])}
    return named | {f"worst_{i}": ordered[-1 - i] for i in range(num_worst)}


def as_text(record: dict) -> str:
    """One rollout for a person to read."""
    lines = [
        f"prompt {record['prompt_id']} sample {record['sample_index']}: reward {record['outcome_reward']:g}, "
        f"EM {record['exact_match']:g}, stopped by {record['stop_reason']}",
        record["prompt_text"],
    ]
    for number, turn in enumerate(record["turns"], start=1):
        gain = "" if turn["info_gain"] is None else f"gain {turn['info_gain']:+.4f}, "
        lines.append(f"--- turn {number} ({gain}advantage {turn['advantage']:+.3f})")
        lines.append(turn["text"] + turn["observation_text"])
    return "\n".join(lines)
