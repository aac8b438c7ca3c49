"""The folder of a warm start, `ROOT/NAME-warmstart/`. Its checkpoints are removed after model.path has been written.

The folder contains config.yaml, config.N.yaml, env.N.txt, metrics.jsonl, tensorboard/, checkpoints/step_N/ and
holder.json. It contains stacks/ only if a rank hung.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint import retention
from a2tgpo.checkpoint.writer import CheckpointWriter
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import broadcast_object, world_group
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.run.claim import claim
from a2tgpo.run.resume import trained_so_far
from a2tgpo.run.rules import WARM_START, settings_of
from a2tgpo.update.optimizer import LearningRateSchedule
from a2tgpo.warmstart.target import folder_of


class WarmStartFolder:
    """Claims the folder of a warm start, and saves and restores its state. Every rank makes the same calls."""

    def __init__(self, config: RunConfig, groups: ParallelGroups):
        self._config = config
        self._groups = groups
        self.path = folder_of(config)
        self._checkpoints = self.path / "checkpoints"
        self._writer = CheckpointWriter(self._checkpoints, timeout_s=config.parallel.timeout_s)
        self.saved_step = 0
        """Step of the newest checkpoint, whose save may still be in progress; 0 if there is none."""

    @property
    def longest_save_s(self) -> float:
        return self._writer.longest_s

    def open(self, resume: str, *, accept_changes: bool) -> Path | None:
        """Create and claim the folder, and return the checkpoint to resume from; None if the warm start begins anew.

        Args:
            resume: `auto`: resume from the newest complete checkpoint, if there is one. `none`: rename the existing
                folder, and begin anew.
            accept_changes: whether to continue although settings, code or packages differ from those of the last
                start.

        Raises:
            ConfigError: on all ranks, with a one-line message, if the folder cannot be claimed or contains another
                experiment.
        """
        fault = ""
        if self._groups.rank == 0:
            try:
                self._lock = claim(
                    self.path,
                    self._config,
                    WARM_START,
                    begins_anew=resume == "none",
                    accept=accept_changes,
                    done=trained_so_far(self.path),
                )
            except ConfigError as error:
                fault = str(error)
        fault = broadcast_object(fault, world_group(), source=0)
        if fault:
            raise ConfigError(fault)
        return None if resume == "none" else checkpoint.latest(self._checkpoints)

    def restore(
        self, path: Path, *, policy: Policy, optimizer: Any, schedule: LearningRateSchedule
    ) -> dict[str, Any]:
        """Load the checkpoint `path` or, if it is damaged, the newest undamaged one before it. Return the state."""
        try:
            _, state = checkpoint.load_newest(path, policy=policy, optimizer=optimizer, schedule=schedule)
        except ValueError as error:
            raise ConfigError(f"--resume: {error}") from error
        retention.set_aside_after(self._checkpoints, state["step"])
        self.saved_step = state["step"]
        return state

    def save(
        self,
        step: int,
        *,
        policy: Policy,
        optimizer: Any,
        schedule: LearningRateSchedule,
        state: dict[str, Any],
    ) -> None:
        """Wait for the previous save, then start to save the checkpoint of step `step`.

        All older checkpoints are removed when the new one is complete.
        """
        self.finish_saving()
        self._writer.start(
            step,
            policy=policy,
            optimizer=optimizer,
            schedule=schedule,
            state=state | {"step": step, "settings": settings_of(self._config)},
            on_complete=functools.partial(
                retention.drop_old, self._checkpoints, keep=1, keep_every=0, keep_gb=0, spare=None
            ),
        )
        self.saved_step = step

    def finish_saving(self) -> None:
        """Wait for the end of a save in progress.

        Raises:
            RuntimeError: with a one-line message, if the save failed.
        """
        if fault := self._writer.wait():
            raise RuntimeError(
                f"the checkpoint of step {self.saved_step} could not be written: {fault}. Free disk space and "
                "start again"
            )

    def remove_checkpoints(self) -> None:
        """Remove all checkpoints, after the model has been written."""
        self.finish_saving()
        if self._groups.rank == 0:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
