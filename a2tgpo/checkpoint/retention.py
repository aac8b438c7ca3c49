"""Which checkpoints are kept: the newest ones whole, and only the weights of some older ones."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch.distributed as dist

from a2tgpo.checkpoint.folder import MARKER, WEIGHTS_ONLY, has_weights_only, is_of_weights, steps_in
from a2tgpo.checkpoint.sharded_state import OPTIMIZER, WEIGHTS
from a2tgpo.io.atomic_file import write_text

logger = logging.getLogger(__name__)

MAX_DROPPED = 2
"""Number of folders of dropped checkpoints that are kept."""


def drop_old(root: str | Path, *, keep: int, keep_every: int, keep_gb: float, spare: int | None) -> None:
    """Keep the `keep` newest checkpoints under `root` whole, and the weights of a few older ones; one rank calls
    this.

    Keeps the weights of step `spare` and of steps that are a multiple of `keep_every` (0: none). If these weights
    take more than `keep_gb` GB (0: no limit), the oldest are removed, but never those of step `spare`.
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
    """Remove everything but the weights and the record of a complete checkpoint; one rank calls this.

    A checkpoint of an earlier version, with weights and optimizer in one folder, is left unchanged.
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
        # Write the marker before the removal, so that no reader expects a file that is about to be removed.
        write_text(path / MARKER, json.dumps(kept | {WEIGHTS_ONLY: True}))
    for entry in path.iterdir():
        if entry.is_dir() and entry.name != WEIGHTS:
            shutil.rmtree(entry)


def set_aside_after(root: str | Path, step: int) -> None:
    """Move checkpoints of later steps to `root/dropped_N/`: a run that resumes from `step` will write its own later
    steps.

    Left in place, the old checkpoints would count as the newest: a start would resume from them, and retention would
    remove the new ones instead. The newest of the checkpoints set aside stays whole, the others keep their weights;
    only the newest `MAX_DROPPED` of these folders stay.
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
    """Return the numbers of the folders of dropped checkpoints, oldest first."""
    numbers = (entry.name.removeprefix("dropped_") for entry in root.glob("dropped_*"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def _is_whole(path: Path) -> bool:
    return (path / MARKER).is_file() and not has_weights_only(path)


def _bound(reduced: list[Path], keep_gb: float, *, spare: int | None) -> None:
    """Remove the oldest of `reduced` until the rest take at most `keep_gb` GB; never remove step `spare`.

    Args:
        reduced: folders of checkpoints, newest first.
    """
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in reduced}
    for path in reversed(reduced):
        if sum(sizes.values()) <= 1e9 * keep_gb:
            return
        if path.name != f"step_{spare}":
            shutil.rmtree(path)
            del sizes[path]
