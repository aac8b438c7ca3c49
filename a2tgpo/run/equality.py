"""Compare the metrics, the rollouts and the checkpoints of two runs bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from a2tgpo.io.errors import ConfigError
from a2tgpo.metrics.writer import METRICS_FILE, read_metrics
from a2tgpo.record.rollout_files import read_step, recorded_steps

NOT_COMPARED = (
    "time/",
    "speed/",
    "rollout/tool_wait",
    "rollout/cached_prefix",
    "gain/computed_tokens",
    "assignment/",
    "reward/wait",
    "tools/outage",
    "search/",
    "visit/",
    "web_search/",
    "checkpoint/failed",
    "memory/",
    "refit/",
)
"""Prefixes of metrics whose values may differ between two equal runs.

These metrics depend on the clock, on failures, on the order in which tools answer or engines take prompts, or on the
weights that an engine had before a refit. The order of answers and prompts changes which contexts an engine finds in
its KV cache, but not the sampled tokens.
"""


def comparable_metrics(run: Path) -> dict[int, dict[str, Any]]:
    """Return, for each step of `run`, the metrics that a second run with the same settings must reproduce.

    Raises:
        ConfigError: with a one-line message, if the run has no metrics.
    """
    try:
        records = read_metrics(run / METRICS_FILE)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from None
    if not records:
        raise ConfigError(f"{run} has no {METRICS_FILE} with a step; give the folder of a run")
    return {
        record["step"]: {name: value for name, value in record.items() if not name.startswith(NOT_COMPARED)}
        for record in records
    }


def differences(first: Path, second: Path) -> list[str]:
    """Return a line for each difference between two runs, in the steps that both runs recorded.

    Raises:
        ConfigError: with a one-line message, if a run has no metrics or the two runs have no step in common.
    """
    ours, theirs = comparable_metrics(first), comparable_metrics(second)
    steps = sorted(ours.keys() & theirs.keys())
    if not steps:
        raise ConfigError(f"{first} and {second} have no step in common; give two runs of the same steps")
    found = []
    for step in steps:
        for name in sorted(ours[step].keys() | theirs[step].keys()):
            mine, other = ours[step].get(name), theirs[step].get(name)
            if mine != other:
                found.append(f"step {step}, {name}: {_shown(mine)} and {_shown(other)}")
    return found + _differing_files(first, second, steps)


def _differing_files(first: Path, second: Path, steps: list[int]) -> list[str]:
    """Return a line for each step whose rollouts differ, and for each step whose checkpoints' tensors differ."""
    # Import here, because this import also imports Megatron, which takes seconds.
    from a2tgpo.checkpoint.folder import MARKER, has_weights_only

    ours, theirs = recorded_steps(first), recorded_steps(second)
    found = []
    for step in steps:
        rollouts = [recorded[step] for recorded in (ours, theirs) if step in recorded]
        if len(rollouts) == 2 and not _hold_the_same(*rollouts):
            found.append(f"step {step}: the rollouts differ")
        markers = [run / "checkpoints" / f"step_{step}" / MARKER for run in (first, second)]
        if all(path.is_file() for path in markers):
            of_weights = any(has_weights_only(path.parent) for path in markers)
            mine, others = (_tensors(path, of_weights=of_weights) for path in markers)
            if mine != others:
                found.append(f"step {step}: the tensors of the checkpoints differ")
    return found


def _hold_the_same(ours: list[Path], theirs: list[Path]) -> bool:
    """Return whether two recordings of a step are equal. Their division into files does not matter."""
    if [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]:
        return True
    return [path.name for path in ours] != [path.name for path in theirs] and read_step(ours) == read_step(
        theirs
    )


def _tensors(marker: Path, *, of_weights: bool) -> dict[str, list[int]]:
    """Return the size and checksum of each tensor file of a checkpoint, or with `of_weights`, of each weight file."""
    from a2tgpo.checkpoint.folder import is_of_weights

    files = json.loads(marker.read_text(encoding="utf-8"))["files"]
    return {
        name: value
        for name, value in files.items()
        if name.endswith(".distcp") and (is_of_weights(name) or not of_weights)
    }


def _shown(value: Any) -> str:
    return "not recorded" if value is None else f"{value!r}"
