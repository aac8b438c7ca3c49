"""Convert a trajectory of a step to a JSON record, and a record to text for a person."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from a2tgpo.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def to_record(
    trajectory: Trajectory,
    turn_values: Mapping[str, torch.Tensor],
    row: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> dict:
    """Return a trajectory, its texts and the training values of its turns as JSON types.

    Inner branches have texts, but no training values.

    Args:
        turn_values: arrays [N, T + 1] by name. A value that is not finite becomes None.
        row: the row of the trajectory in each array of `turn_values`.
    """
    record = trajectory.to_dict()
    for column, turn in enumerate(record["turns"]):
        for name, values in turn_values.items():
            value = values[row, column].item()
            turn[name] = value if math.isfinite(value) else None
    for one in (record, *record["inner_branches"]):
        for turn in one["turns"]:
            turn["text"] = tokenizer.decode(turn["tokens"])
            turn["observation_text"] = tokenizer.decode(turn["observation_tokens"])
        one["prompt_text"] = tokenizer.decode(one["prompt_tokens"])
    return record


def as_text(record: dict) -> str:
    """Return the record of one rollout as a text for a person to read."""
    lines = [
        f"prompt {record['prompt_id']} sample {record['sample_index']}: reward {record['outcome_reward']:g}, "
        f"EM {record['exact_match']:g}, stopped by {record['stop_reason']}",
        record["prompt_text"],
    ]
    for number, turn in enumerate(record["turns"], start=1):
        gain = "" if turn["info_gain"] is None else f"gain {turn['info_gain']:+.4f}, "
        if turn["score"] is not None:
            gain += f"score {turn['score']:+.4f}, "
        lines.append(f"--- turn {number} ({gain}advantage {turn['advantage']:+.3f})")
        lines.append(turn["text"] + turn["observation_text"])
    return "\n".join(lines)
