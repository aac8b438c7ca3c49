"""Check that a step computed twice gives the same bits. Both runs use launch/train.py, as users do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from a2tgpo.run.equality import differences

from gpu_checks.bench import Bench
from gpu_checks.models import write_checkpoint
from gpu_checks.step import STEPS, write_run

ROOT = Path(__file__).parents[2]


def check_resume(bench: Bench) -> None:
    """Train a run with a checkpoint after each step, then repeat its last step from the checkpoint before it.

    Both runs set `run.deterministic`.
    """
    import torch

    from a2tgpo.parallel.determinism import FIRST_CAPABILITY

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        reason = f"run.deterministic needs compute capability {FIRST_CAPABILITY[0]}.{FIRST_CAPABILITY[1]}"
        bench.skip("resumed run", reason)
        return
    config = write_run(
        bench,
        {
            "run": {"deterministic": True},
            "checkpoint": {"every": 1, "keep": STEPS},
            "evaluation": {"at_start": False},
        },
    )
    settings = json.loads(config.read_text())
    write_checkpoint(Path(settings["model"]["path"]))
    runs = Path(settings["run"]["root"])
    _train(config, "run.name=unbroken")
    checkpoint = runs / "unbroken" / "checkpoints" / f"step_{STEPS - 1}"
    _train(config, "run.name=resumed", "--resume", str(checkpoint))
    found = differences(runs / "resumed", runs / "unbroken")
    note = "; ".join(found[:3]) or f"step {STEPS}: metrics, rollouts and checkpoint"
    bench.at_most("resumed run, values that differ from the unbroken one", len(found), 0, note=note)


def _train(config: Path, *arguments: str) -> None:
    """Run launch/train.py in its own process, with its output in this process's log.

    Raises:
        RuntimeError: if the exit code is not 0.
    """
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config), *arguments]
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise RuntimeError(f"launch/train.py {' '.join(arguments)} ended with exit code {code}")
