"""Format the last lines of a run: where the results are, or why the run stopped and how to continue it."""

from __future__ import annotations

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint.best import BestCheckpoint
from a2tgpo.io.exit_codes import START_AGAIN
from a2tgpo.metrics.guards import Guards
from a2tgpo.run.folder import RunFolder
from a2tgpo.run.starts import ACCEPT


def finished(folder: RunFolder, best: BestCheckpoint) -> str:
    return (
        f"done. metrics: {folder.path}/metrics.jsonl  rollouts: {folder.path}/rollouts  "
        f"checkpoints: {folder.checkpoints}  best: {best.describe()}\n"
        f"look: tensorboard --logdir {folder.path}/tensorboard"
    )


def stopped(folder: RunFolder, step: int, *, num_steps: int, reason: str) -> str:
    """Return the line for a requested stop, after which the next start continues the run."""
    saved = f"saved as {folder.checkpoints}/step_{step}" if step else "nothing to save yet"
    return (
        f"stopped after step {step} of {num_steps}: {reason}; {saved}; the next start "
        f"continues from there (exit code {START_AGAIN})"
    )


def alarmed(folder: RunFolder, best: BestCheckpoint, step: int, *, num_steps: int, guards: Guards) -> str:
    """Return the line for a stop by the guards: the reason, the last good weights, and the way to continue."""
    last_good = ""
    if guards.num_skipping:
        steps = [
            old
            for old in checkpoint.steps_in(folder.checkpoints)
            if old <= step - guards.num_skipping
            and not checkpoint.has_weights_only(folder.checkpoints / f"step_{old}")
        ]
        place = f"{folder.checkpoints}/step_{steps[0]}" if steps else "the untrained model"
        last_good = f"last checkpoint before the first skipped update: {place}. "
    return (
        f"stopped after step {step} of {num_steps}: {guards.reason}. "
        f"best: {best.describe()}. {last_good}To continue nevertheless: {guards.stop_setting}; "
        f"from an earlier checkpoint, with other settings: --resume {folder.checkpoints}/step_N {ACCEPT}"
    )
