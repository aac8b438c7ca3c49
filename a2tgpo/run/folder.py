"""The folder of a run: its files, and resuming from it.

`ROOT/NAME/`: config.yaml (resolved), config.N.yaml and env.N.txt (of the N-th start), date.txt (today's date, as
prompts tell it), metrics.jsonl, tensorboard/, rollouts/step_N/ (`record.rollout_files`), checkpoints/step_N/,
checkpoints/best.json, bank/ (rollouts no checkpoint covers yet), stacks/ (when something hung), holder.json (the
process that writes here).
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint import retention
from a2tgpo.checkpoint.best import BestCheckpoint, write_best
from a2tgpo.checkpoint.writer import CheckpointWriter
from a2tgpo.collect.bank import drop_covered
from a2tgpo.collect.carried_pool import Carried, bounded, carried, carried_file, encode, read
from a2tgpo.config.load import flat_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.template import today
from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import START_AGAIN
from a2tgpo.metrics.guards import Guards
from a2tgpo.metrics.ratio_noise import RatioNoise
from a2tgpo.metrics.slow_ranks import SlowRanks
from a2tgpo.metrics.writer import MetricWriter
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.record.recorder import Recorder
from a2tgpo.record.rollout_retention import RolloutRetention
from a2tgpo.run import date as run_date
from a2tgpo.run.claim import claim
from a2tgpo.run.date import read_date
from a2tgpo.run.resume import changed_settings, check_resume, follow_settings, trained_so_far
from a2tgpo.run.rules import TRAINING, describe_changes, settings_of
from a2tgpo.run.starts import ACCEPT

if TYPE_CHECKING:
    from a2tgpo.assemble import RunParts


logger = logging.getLogger(__name__)


class RunFolder:
    """Opens, fills and resumes one run; every rank has one and makes the same calls."""

    def __init__(self, config: RunConfig, groups: ParallelGroups):
        self._config = config
        self._groups = groups
        self.path = Path(config.run.root) / config.run.name
        self.best = BestCheckpoint(self._checkpoints, config.checkpoint.best_by, is_writer=groups.rank == 0)
        self._writer = CheckpointWriter(self._checkpoints, timeout_s=config.parallel.timeout_s)
        self._rollouts = RolloutRetention(self.path, keep_gb=config.run.keep_rollouts_gb)
        self._complete: tuple[int, dict | None] = (0, None)
        """Step of the last complete checkpoint (0: none), and the best policy at that time."""
        self._saving: tuple[int, dict | None] = self._complete
        self._is_auto = False
        self.evaluation_is_due = False
        """Whether the evaluation after the last step has not been made yet; set by `restore`."""
        self._reported = 0
        self._num_failures = 0
        self._recorder: Recorder | None = None

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
        self._is_auto = resume == "auto"
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
        return checkpoint.latest(self._checkpoints) if resume == "auto" else Path(resume)

    def restore(self, path: Path | None, parts: RunParts, guards: Guards) -> int:
        """Restore the checkpoint's state; None: a new run. Returns the number of steps done.

        If `open` chose the checkpoint and its tensors are damaged, the newest undamaged one before it is used
        instead.

        Checkpoints of later steps are set aside; a checkpoint of the same step is too, unless it is `path`. The best
        policy is the one stored in the checkpoint, if it belongs to this run.
        """
        step, is_own = 0, True
        if path is not None:
            parts.phases.enter("checkpoint")
            try:
                held = dict(policy=parts.policy, optimizer=parts.optimizer, schedule=parts.schedule)
                if self._is_auto:
                    path, state = checkpoint.load_newest(path, **held)
                else:
                    state = checkpoint.load(path, **held)
            except ValueError as error:
                raise ConfigError(f"--resume: {error}") from error
            step = int(state["step"])
            # A converted model has seen no question yet.
            if "sampler" in state:
                parts.sampler.load_state_dict(state["sampler"])
            is_own = path.resolve() == (self._checkpoints / f"step_{step}").resolve()
            changed = changed_settings(state, self._config)
            if changed and not is_own and self._groups.rank == 0:
                logger.warning(
                    "the run starts with other settings than %s: %s", path, describe_changes(changed)
                )
            parts.carried.state = self._read_carried(path, parts, step, changed)
            self.evaluation_is_due = state.get("evaluation_is_due", False)
            # Checkpoints of earlier versions have neither guards nor a best policy.
            if "guards" in state:
                guards.load_state_dict(state["guards"])
            # Another run's best policy refers to checkpoints that do not exist here.
            self.best.load_state_dict(self._if_comparable(state, parts) if is_own else None)
        retention.set_aside_after(self._checkpoints, step if is_own else step - 1)
        self.best.write()
        self._complete = (step, self.best.state_dict())
        if is_own:
            self._saving = self._complete
        return step

    def save(self, step: int, parts: RunParts, guards: Guards, *, evaluation_is_due: bool = False) -> None:
        """Start a checkpoint of `step` steps, once the previous one is complete; every rank must call this.

        With `evaluation_is_due`, a run that resumes from this checkpoint first makes the evaluation of `step`. Once
        the checkpoint is complete, `retention` removes older ones. By then the rollouts of earlier steps are on disk,
        since a resumed run does not play those steps again.
        """
        self.finish_saving(is_last=False)
        if self._recorder is not None:
            self._recorder.finish_rollouts()
        parts.phases.enter("checkpoint")
        best = self.best.state_dict()
        self._writer.start(
            step,
            policy=parts.policy,
            optimizer=parts.optimizer,
            schedule=parts.schedule,
            state={
                "step": step,
                "settings": settings_of(self._config),
                "sampler": parts.sampler.state_dict(),
                "test_questions": parts.test_prompts.fingerprint,
                "guards": guards.state_dict(),
                "evaluation_is_due": evaluation_is_due,
                "best": best,
            },
            own_files=self._carried_file(parts),
            on_complete=functools.partial(self._tidy, step, best),
        )
        self._saving = (step, best)

    def _carried_file(self, parts: RunParts) -> dict[str, bytes]:
        """Return this rank's own files for a checkpoint: with `rollout.partial`, the groups that its replica carries
        over.
        """
        if not (self._config.rollout.partial.is_on and parts.replicas.is_first):
            return {}
        return {carried_file(parts.replicas.index): encode(parts.carried.state)}

    def _read_carried(
        self, path: Path, parts: RunParts, step: int, changed: dict[str, tuple[Any, Any]]
    ) -> Carried:
        """Read the groups that a checkpoint carries over; drop, with a warning, those that the settings no longer
        allow.
        """
        try:
            held = read(path, num_replicas=parts.replicas.count)
        except ValueError as error:
            raise ConfigError(f"--resume: {error}") from error
        partial = self._config.rollout.partial
        before = carried(held, replica=parts.replicas.index)
        young = bounded(before, step, max_groups=partial.extra_prompts, max_staleness=partial.max_staleness)
        keys = {entry.key for entry in young.entries}
        kept, dropped = follow_settings(
            [item for item in held if item.group.key in keys],
            config=self._config,
            prompts=parts.train_prompts,
            changed=changed,
        )
        if num_dropped := len(before.entries) - len(young.entries):
            state = f"on with extra_prompts {partial.extra_prompts}, max_staleness {partial.max_staleness}"
            dropped["since rollout.partial is " + (state if partial.is_on else "off")] = num_dropped
        if dropped and self._groups.rank == 0:
            logger.warning(
                "of %d groups carried over by %s, some are dropped with all their turns: %s",
                len(held),
                path,
                "; ".join(f"{count} {reason}" for reason, count in dropped.items()),
            )
        return carried(kept, replica=parts.replicas.index)

    @property
    def saved_step(self) -> int:
        """Step of this run's newest checkpoint, including one being written; 0: none."""
        return self._saving[0]

    @property
    def longest_save_s(self) -> float:
        """Duration of the longest save of this start so far, seconds."""
        return self._writer.longest_s

    def finish_saving(self, *, is_last: bool = True) -> None:
        """Wait for the checkpoint being written, if any; every rank must call this, also last before the program
        ends.

        Raises:
            RuntimeError: one line; the last save of the run failed, or `checkpoint.max_failures` in a row did.
        """
        fault = self._writer.wait()
        if fault is None:
            return
        if not fault:
            self._num_failures, self._complete = 0, self._saving
            return
        self._num_failures += 1
        step, best_before = self._complete
        if self.best.step == self._saving[0]:  # its checkpoint failed, so its weights do not exist
            self.best.load_state_dict(best_before)
        if is_last or self._num_failures >= self._config.checkpoint.max_failures:
            last = f"{self._checkpoints}/step_{step}" if step else "none; the next start begins at step 0"
            raise RuntimeError(
                f"the checkpoint of step {self._saving[0]} could not be written: {fault} "
                f"({self._num_failures} in a row). Last complete one: {last}. Free disk space and start the run "
                "again"
            )
        self._saving = self._complete

    def report_saving(self, recorder: Recorder, step: int) -> None:
        """Report a failed save once, as soon as this rank knows of the failure; the run continues."""
        fault = self._writer.outcome
        if fault and self._reported != self._saving[0]:
            self._reported = self._saving[0]
            recorder.record_failed_save(
                step, f"the checkpoint of step {self._reported} could not be written: {fault}"
            )

    def _tidy(self, step: int, best: dict | None) -> None:
        """Update best.json, then apply retention; rank 0 calls this once a checkpoint is complete. In this order,
        best.json always names an existing checkpoint.
        """
        write_best(self._checkpoints, best)
        kept = self._config.checkpoint
        retention.drop_old(
            self._checkpoints,
            keep=kept.keep,
            keep_every=kept.keep_every,
            keep_gb=kept.keep_gb,
            spare=best["step"] if best else None,
        )
        drop_covered(self.bank, step)
        self._rollouts.trim(step)

    def recorder(self, parts: RunParts, *, step: int) -> Recorder:
        """Create this run's recorder; on resuming from `step`, records of later steps are dropped."""
        writer = MetricWriter(
            self.path,
            total_steps=self._config.run.steps,
            enabled=self._groups.rank == 0,
            resume_step=step or None,
        )
        writer.log_hyperparameters(flat_config(self._config), ["evaluation/em", "reward/mean"])
        self._recorder = Recorder(
            writer,
            self.path,
            groups=self._groups,
            tokenizer=parts.tokenizer,
            num_texts=self._config.run.log_rollouts,
            slow_ranks=SlowRanks(
                ratio=self._config.watchdog.slow_ratio, steps=self._config.watchdog.slow_steps
            ),
            ratio_noise=RatioNoise(self._config),
        )
        return self._recorder

    def report_end(self, recorder: Recorder) -> None:
        """Print where the results are."""
        recorder.writer.print(
            f"done. metrics: {self.path}/metrics.jsonl  rollouts: {self.path}/rollouts  "
            f"checkpoints: {self._checkpoints}  best: {self.best.describe()}\n"
            f"look: tensorboard --logdir {self.path}/tensorboard"
        )

    def report_stop(self, recorder: Recorder, step: int, reason: str) -> None:
        """Print that the run stopped early on request, and that the next start resumes it."""
        saved = f"saved as {self._checkpoints}/step_{step}" if step else "nothing to save yet"
        recorder.writer.print(
            f"stopped after step {step} of {self._config.run.steps}: {reason}; {saved}; the next start "
            f"continues from there (exit code {START_AGAIN})"
        )

    def report_guard_stop(self, recorder: Recorder, step: int, guards: Guards) -> None:
        """Print why the guards stopped the run, where its best weights are, and how to continue."""
        last_good = ""
        if guards.num_skipping:
            steps = [
                old
                for old in checkpoint.steps_in(self._checkpoints)
                if old <= step - guards.num_skipping
                and not checkpoint.has_weights_only(self._checkpoints / f"step_{old}")
            ]
            place = f"{self._checkpoints}/step_{steps[0]}" if steps else "the untrained model"
            last_good = f"last checkpoint before the first skipped update: {place}. "
        recorder.writer.print(
            f"stopped after step {step} of {self._config.run.steps}: {guards.reason}. "
            f"best: {self.best.describe()}. {last_good}To continue nevertheless: {guards.stop_setting}; "
            f"from an earlier checkpoint, with other settings: --resume {self._checkpoints}/step_N {ACCEPT}"
        )

    def _if_comparable(self, state: dict, parts: RunParts) -> dict | None:
        """Return the best policy in `state`, or None if later ones cannot be compared with it.

        The best policy's checkpoint may no longer exist, or its score may be for other held-out questions.

        Ranks may see different files on a network file system, but must agree on which checkpoints to save.
        """
        world = dist.group.WORLD
        assert world is not None, "torch.distributed is not initialised"
        best, questions = state.get("best"), parts.test_prompts.fingerprint
        if best is not None and state.get("test_questions", questions) != questions:
            if self._groups.rank == 0:
                logger.warning(
                    "data.test has changed since step %d: the best checkpoint so far, step %d, is no longer "
                    "compared",
                    state["step"],
                    best["step"],
                )
            best = None
        is_there = best is not None and self.best.has_weights(best["step"])
        return broadcast_object(best if is_there else None, world, source=0)

    @property
    def bank(self) -> Path:
        return self.path / "bank"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"
