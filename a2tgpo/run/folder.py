"""The folder of a run: its files, and resuming from it.

`ROOT/NAME/`: config.yaml (resolved), config.N.yaml and env.N.txt (of the N-th start), date.txt (today's date, as
prompts tell it), metrics.jsonl, tensorboard/, rollouts/step_N/ (`record.rollout_files`), checkpoints/step_N/,
checkpoints/best.json, bank/ (rollouts no checkpoint covers yet), stacks/ (when something hung), holder.json (the
process that writes here).
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
    """Claims the folder of one run, and names its parts; every rank has one and makes the same calls."""

    def __init__(self, config: RunConfig, groups: ParallelGroups):
        self._config = config
        self._groups = groups
        self.path = Path(config.run.root) / config.run.name

    def open(self, resume: str, *, accept_changes: bool = False) -> Path | None:
        """Create the folder and find the checkpoint to resume from.

        Args:
            resume: auto (the newest complete checkpoint, if any) | none (rename the old folder to
                NAME.previous_N) | a checkpoint's folder.
            accept_changes: continue although settings, code or packages differ from the last start.

        Raises:
            ConfigError: if `resume` is a path without a checkpoint, or the run's folder cannot be created, is held by
                another process, or holds another experiment.
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
        """Create this run's recorder; on resuming from `step`, records of later steps are dropped."""
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
        )

    @property
    def bank(self) -> Path:
        return self.path / "bank"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"
