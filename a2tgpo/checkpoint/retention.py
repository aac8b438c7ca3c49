"""Remove old checkpoints of a run, and reduce some old checkpoints to their weights."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch.distributed as dist

from a2tgpo.checkpoint.folder import MARKER, WEIGHTS_ONLY, has_weights_only, is_of_weights, steps_in
from a2tgpo.checkpoint.sharded_state import OPTIMIZER, WEIGHTS
from a2tgpo.io.atomic_file import write_text
from a2tgpo.model.adapter_files import ADAPTER_FOLDER

logger = logging.getLogger(__name__)

MAX_DROPPED = 2
"""The number of folders `dropped_N` that a run keeps."""


def drop_old(root: str | Path, *, keep: int, keep_every: int, keep_gb: float, spare: int | None) -> None:
    """Remove old checkpoints under `root`, and reduce some of them to their weights; one rank calls this.

    The `keep` newest checkpoints stay whole. An older checkpoint keeps its weights if its step is `spare` or a
    multiple of `keep_every`. If `keep_every` is 0, only step `spare` counts. All other checkpoints are removed. If
    the kept weights take more than `keep_gb` GB, the oldest are removed too, except those of step `spare`. If
    `keep_gb` is 0, there is no limit.
    """
    root = Path(root)
    steps = steps_in(root)
    whole = [step for step in steps if _is_whole(root / f"step_{step}")][:keep]
    reduced = []
    for step in (step for step in steps if step not in whole):
        path = root / f"step_{step}"
        if step == spare or (keep_every and step % keep_every == 0):
            reduce_to_weights(path)
            reduced.append(path)
        else:
            shutil.rmtree(path)
    if keep_gb:
        _bound(reduced, keep_gb, spare=spare)


def reduce_to_weights(path: Path) -> None:
    """Remove all of a complete checkpoint except its weights and `state.json`; one rank calls this.

    A checkpoint of an earlier version has weights and optimizer in one folder, so it stays unchanged.
    """
    if not has_weights_only(path):
        if not (path / OPTIMIZER).is_dir():
            return
        try:
            marker = json.loads((path / MARKER).read_text())
            kept = {
                key: {name: value for name, value in marker[key].items() if is_of_weights(name)}
                for key in ("files", "pieces")
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            logger.warning("left %s unchanged: its %s is damaged", path, MARKER)
            return
        # Write `complete.json` before the removal, so that it never lists a file that has been removed.
        write_text(path / MARKER, json.dumps(kept | {WEIGHTS_ONLY: True}))
    for entry in path.iterdir():
        if entry.is_dir() and entry.name not in (WEIGHTS, ADAPTER_FOLDER):
            shutil.rmtree(entry)


def set_aside_after(root: str | Path, step: int) -> None:
    """Move the checkpoints of steps after `step` to `root/dropped_N/`. Every rank must call this.

    If these checkpoints were not moved, the next start would resume from them. Only the newest `MAX_DROPPED` folders
    `dropped_N` are kept.
    """
    root = Path(root)
    if dist.get_rank() == 0 and (later := [old for old in steps_in(root) if old > step]):
        dropped = _dropped(root)
        aside = root / f"dropped_{dropped[-1] + 1 if dropped else 1}"
        aside.mkdir()
        for old in later:
            (root / f"step_{old}").rename(aside / f"step_{old}")
        logger.warning("set checkpoints after step %d aside in %s", step, aside)
        drop_old(aside, keep=1, keep_every=1, keep_gb=0, spare=None)
        for number in dropped[: len(dropped) + 1 - MAX_DROPPED]:
            shutil.rmtree(root / f"dropped_{number}")
            logger.warning("removed %s: there are %d newer ones", root / f"dropped_{number}", MAX_DROPPED)
    dist.barrier()


def _dropped(root: Path) -> list[int]:
    """Return the number N of each folder `dropped_N` under `root`, the oldest folder first."""
    numbers = (entry.name.removeprefix("dropped_") for entry in root.glob("dropped_*"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def _is_whole(path: Path) -> bool:
    return (path / MARKER).is_file() and not has_weights_only(path)


def _bound(reduced: list[Path], keep_gb: float, *, spare: int | None) -> None:
    """Remove the last folders of `reduced`, except that of step `spare`, until the rest take `keep_gb` GB or less."""
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in reduced}
    for path in reversed(reduced):
        if sum(sizes.values()) <= 1e9 * keep_gb:
            return
        if path.name != f"step_{spare}":
            shutil.rmtree(path)
            del sizes[path]
