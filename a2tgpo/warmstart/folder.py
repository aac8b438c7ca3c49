"""Manage the folder of a warm start. The folder has a lock and the identity of the warm start, and it keeps
checkpoints until the warm start has written model.path.

The folder `ROOT/NAME-warmstart/` contains config.yaml, config.N.yaml, env.N.txt, metrics.jsonl, tensorboard/,
checkpoints/step_N/ and holder.json. It contains stacks/ only if some rank hung.
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
    """Claims the folder of one warm start, and saves and restores its state. Every rank has one and makes the same
    calls.
    """

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
        """Create and claim the folder; return the checkpoint to resume from, or None if the warm start begins anew.

        Args:
            resume: one of `auto` and `none`. With `auto`, the warm start resumes from its newest complete checkpoint
                if it has one. With `none`, the existing folder is renamed.
            accept_changes: whether to continue although settings, code or packages differ from the last start.

        Raises:
            ConfigError: one line; the folder cannot be claimed, or it contains another experiment; raised on all
                ranks.
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
        """Load the checkpoint `path`, and return the state in it.

        If the checkpoint is damaged, load the newest earlier checkpoint that is undamaged.
        """
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
        """Wait for the previous save, then start to save a checkpoint after `step` steps.

        When the new checkpoint is complete, all older checkpoints are removed.
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
        """If a save is in progress, wait for its end.

        Raises:
            RuntimeError: one line; the save failed.
        """
        if fault := self._writer.wait():
            raise RuntimeError(
                f"the checkpoint of step {self.saved_step} could not be written: {fault}. Free disk space and "
                "start again"
            )

    def remove_checkpoints(self) -> None:
        """Remove all checkpoints. Call this after the warm start has written its model."""
        self.finish_saving()
        if self._groups.rank == 0:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
