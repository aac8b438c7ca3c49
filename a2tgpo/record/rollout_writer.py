"""Write the rollouts of a step in the background while training continues."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from a2tgpo.record.rollout_files import part_path, write_part
from a2tgpo.record.rollout_record import to_record
from a2tgpo.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class RolloutWriter:
    """Write a replica's rollouts in a thread, one step at a time. The first rank of every replica creates a writer.

    The thread decodes with `tokenizer`, which several threads may use at once.
    """

    def __init__(self, run_dir: Path, *, replica: int, num_replicas: int, tokenizer: PreTrainedTokenizerBase):
        self._run_dir = run_dir
        self._replica = replica
        self._num_replicas = num_replicas
        self._tokenizer = tokenizer
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: BaseException | None = None
        self._num_failures = 0

    def start(
        self, step: int, trajectories: Sequence[Trajectory], turn_values: Mapping[str, torch.Tensor]
    ) -> None:
        """Start writing the rollouts of `step` as soon as the previous step is written.

        The arguments must not change afterwards. `turn_values` has arrays [N, T + 1] by name (see `to_record`).
        """
        self.wait()
        self._step = step
        # The thread is not a daemon, so that it completes its files even if the program fails elsewhere.
        self._thread = threading.Thread(
            target=self._write, args=(step, trajectories, turn_values), name="rollouts"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the started step is on disk or its write has failed. If an OSError occurred, log a warning."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, OSError):
            self._num_failures += 1
            logger.warning(
                "could not record the rollouts of step %d: %s (%s)",
                self._step,
                error.strerror,
                error.filename,
            )
        elif error is not None:
            raise error

    def take_failures(self) -> int:
        """Return the number of steps whose write has failed since the last call."""
        failures, self._num_failures = self._num_failures, 0
        return failures

    def _write(
        self, step: int, trajectories: Sequence[Trajectory], turn_values: Mapping[str, torch.Tensor]
    ) -> None:
        path = part_path(self._run_dir, step, replica=self._replica, num_replicas=self._num_replicas)
        records = (
            to_record(trajectory, turn_values, row, tokenizer=self._tokenizer)
            for row, trajectory in enumerate(trajectories)
        )
        try:
            write_part(records, path)
        except BaseException as error:  # `wait` raises it or logs a warning
            self._error = error
