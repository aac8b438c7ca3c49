"""Claim the folder of a run, and find the checkpoint from which the run resumes.

These files are in the folder `ROOT/NAME/`:

`config.yaml` is the resolved configuration of the last start.
`config.N.yaml` and `env.N.txt` are the configuration and the environment of the N-th start.
`date.txt` has the date that the prompts give as today's date.
`plugins/` has copies of the user's own rewards and tools (`run.plugins`).
`judge/` has the replies of the reward `judge`.
`metrics.jsonl` and `tensorboard/` have the metrics.
`rollouts/step_N/` has the recorded rollouts of step N (`record.rollout_files`).
`checkpoints/step_N/` is a checkpoint, and `checkpoints/best.json` names the best checkpoint.
`bank/` has the rollouts that no checkpoint covers yet.
`profile/step_N/` has the profiles of step N, if N is in `profile.steps`.
`stacks/` exists only if a rank hung.
`holder.json` names the process that writes to the folder.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.config.load import flat_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.template import today
from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.errors import ConfigError
from a2tgpo.metrics.ratio_noise import RatioNoise
from a2tgpo.metrics.slow_ranks import SlowRanks
from a2tgpo.metrics.writer import MetricWriter
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.record.recorder import Recorder
from a2tgpo.run import date as run_date
from a2tgpo.run.claim import claim
from a2tgpo.run.date import read_date
from a2tgpo.run.resume import check_resume, trained_so_far
from a2tgpo.run.rules import TRAINING

logger = logging.getLogger(__name__)


class RunFolder:
    """Claims the folder of one run, and gives the paths of its parts. Every rank makes the same calls."""

    def __init__(self, config: RunConfig, groups: ParallelGroups):
        self._config = config
        self._groups = groups
        self.path = Path(config.run.root) / config.run.name

    def open(self, resume: str, *, accept_changes: bool = False) -> Path | None:
        """Create and claim the folder; return the checkpoint to resume from, or None if the run begins at step 0.

        Args:
            resume: `auto`, `none`, or the folder of a checkpoint. With `auto`, the run resumes from its newest
                complete checkpoint if it has one. With `none`, the old folder is renamed to NAME.previous_N.
            accept_changes: whether to continue if settings, code or packages differ from those of the last start.

        Raises:
            ConfigError: on all ranks, if the folder cannot be claimed, or if `resume` is a path without a checkpoint.
        """
        check_resume(resume)
        fault = [""]
        if self._groups.rank == 0:
            try:
                self._lock = claim(
                    self.path,
                    self._config,
                    TRAINING,
                    begins_anew=resume == "none",
                    accept=accept_changes,
                    done=trained_so_far(self.path),
                )
                if read_date(self.path) is None:
                    write_text(self.path / run_date.FILE, f"{today()}\n")
            except ConfigError as error:
                fault = [str(error)]
            except OSError as error:
                fault = [f"run.root: {error.filename} cannot be written ({error.strerror})"]
        dist.broadcast_object_list(fault, src=0)
        if fault[0]:
            raise ConfigError(fault[0])
        if resume == "none":
            return None
        return checkpoint.latest(self.checkpoints) if resume == "auto" else Path(resume)

    def recorder(self, tokenizer: PreTrainedTokenizerBase, *, step: int) -> Recorder:
        """Return a recorder for a run that resumes after `step` steps. The records of later steps are dropped."""
        writer = MetricWriter(
            self.path,
            total_steps=self._config.run.steps,
            enabled=self._groups.rank == 0,
            resume_step=step or None,
        )
        writer.log_hyperparameters(flat_config(self._config), ["evaluation/em", "reward/mean"])
        return Recorder(
            writer,
            self.path,
            groups=self._groups,
            tokenizer=tokenizer,
            num_texts=self._config.run.log_rollouts,
            slow_ranks=SlowRanks(
                ratio=self._config.watchdog.slow_ratio, steps=self._config.watchdog.slow_steps
            ),
            ratio_noise=RatioNoise(self._config),
            turn_signal=self._config.algorithm.turn_signal,
        )

    @property
    def bank(self) -> Path:
        return self.path / "bank"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"
