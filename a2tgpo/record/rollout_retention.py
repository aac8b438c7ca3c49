"""Limit the size of a run's recorded rollouts. The oldest steps are removed first, and every hundredth step last."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path

from a2tgpo.record.rollout_files import step_paths

LASTING_EVERY = 100
"""Steps whose number is a multiple of 100 are removed last, so that a long run keeps some of its early steps."""

logger = logging.getLogger(__name__)


class RolloutRetention:
    """Remove recorded rollouts of one run. Create only one instance per run, in one process.

    Args:
        run_dir: the folder of the run.
        keep_gb: limit of all recorded rollouts together, in units of 10^9 bytes. 0: no limit.
    """

    def __init__(self, run_dir: Path, *, keep_gb: float):
        self._run_dir = run_dir
        self._keep_gb = keep_gb
        self._sizes: dict[Path, int] = {}
        """Number of bytes of each step whose files will not change any more."""
        self._has_warned = False

    def trim(self, covered: int) -> None:
        """Remove recorded steps before `covered`, the step of the newest checkpoint, until the limit is met.

        Files that cannot be removed are ignored.
        """
        if not self._keep_gb:
            return
        found = step_paths(self._run_dir)
        sizes = {path: self._size(path, is_final=step <= covered) for step, path in found}
        excess = sum(sizes.values()) - self._keep_gb * 1e9
        removed = []
        for step, path in sorted(found, key=lambda entry: (entry[0] % LASTING_EVERY == 0, entry[0])):
            if excess <= 0:
                break
            if step < covered:
                _remove(path)
                self._sizes.pop(path, None)
                excess -= sizes[path]
                removed.append(step)
        if removed and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the recorded rollouts exceed run.keep_rollouts_gb (%g): from now on the oldest steps are "
                "removed, every %dth one last (logged once; first steps %d to %d)",
                self._keep_gb,
                LASTING_EVERY,
                min(removed),
                max(removed),
            )

    def _size(self, path: Path, *, is_final: bool) -> int:
        if path in self._sizes:
            return self._sizes[path]
        size = 0
        with contextlib.suppress(OSError):
            files = list(path.iterdir()) if path.is_dir() else [path]
            size = sum(file.stat().st_size for file in files)
            if is_final:
                self._sizes[path] = size
        return size


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
