"""The checkpoints of a run: saved beside training, restored, and which of them is the best."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint import retention
from a2tgpo.checkpoint.best import BestCheckpoint, write_best
from a2tgpo.checkpoint.writer import CheckpointWriter
from a2tgpo.collect.bank import drop_covered
from a2tgpo.collect.carried_pool import Carried, bounded, carried, carried_file, encode, read
from a2tgpo.collect.state import RolloutState
from a2tgpo.config.run import RunConfig
from a2tgpo.data.template import PromptSet
from a2tgpo.io.errors import ConfigError
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.metrics.guards import Guards
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import broadcast_object, world_group
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.record.recorder import Recorder
from a2tgpo.record.rollout_retention import RolloutRetention
from a2tgpo.run.folder import RunFolder
from a2tgpo.run.resume import changed_settings, follow_settings
from a2tgpo.run.rules import describe_changes, settings_of
from a2tgpo.update.optimizer import LearningRateSchedule

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves and restores one run; every rank has one and makes the same calls.

    Args:
        folder: of the run.
        policy, optimizer, schedule, state, guards: what a checkpoint holds.
        phases: prepares the GPU before a save or a load.
        train_prompts, test_prompts: the questions that `state` and the best score refer to.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        groups: ParallelGroups,
        engine_group: EngineGroup,
        *,
        policy: Policy,
        optimizer: Any,
        schedule: LearningRateSchedule,
        state: RolloutState,
        guards: Guards,
        phases: MemoryPhases,
        train_prompts: PromptSet,
        test_prompts: PromptSet,
    ):
        self._config = config
        self._groups = groups
        self._engine_group = engine_group
        self._policy, self._optimizer, self._schedule = policy, optimizer, schedule
        self._state = state
        self._guards = guards
        self._phases = phases
        self._train_prompts, self._test_prompts = train_prompts, test_prompts
        self._path = folder.checkpoints
        self._bank = folder.bank
        self.best = BestCheckpoint(self._path, config.checkpoint.best_by, is_writer=groups.rank == 0)
        self._writer = CheckpointWriter(self._path, timeout_s=config.parallel.timeout_s)
        self._rollouts = RolloutRetention(folder.path, keep_gb=config.run.keep_rollouts_gb)
        self._complete: tuple[int, dict | None] = (0, None)
        """Step of the last complete checkpoint (0: none), and the best policy at that time."""
        self._saving: tuple[int, dict | None] = self._complete
        self.evaluation_is_due = False
        """Whether the evaluation after the last step is still to be made; set by `restore`."""
        self._reported = 0
        self._num_failures = 0

    def restore(self, path: Path | None, *, is_auto: bool = False) -> int:
        """Load the checkpoint at `path`; None: a new run. Return the number of steps done.

        Checkpoints of later steps are set aside; a checkpoint of the same step is too, unless it is `path`. The best
        policy is the one stored in the checkpoint, if it belongs to this run.

        Args:
            is_auto: if the checkpoint turns out to be damaged, load the newest whole one before it.
        """
        step, is_own = 0, True
        if path is not None:
            self._phases.enter("checkpoint")
            try:
                held = dict(policy=self._policy, optimizer=self._optimizer, schedule=self._schedule)
                if is_auto:
                    path, state = checkpoint.load_newest(path, **held)
                else:
                    state = checkpoint.load(path, **held)
            except ValueError as error:
                raise ConfigError(f"--resume: {error}") from error
            step = int(state["step"])
            # A converted model has seen no question yet.
            if "sampler" in state:
                self._state.sampler.load_state_dict(state["sampler"])
            is_own = path.resolve() == (self._path / f"step_{step}").resolve()
            changed = changed_settings(state, self._config)
            if changed and not is_own and self._groups.rank == 0:
                logger.warning(
                    "the run starts with other settings than %s: %s", path, describe_changes(changed)
                )
            self._state.carried = self._read_carried(path, step, changed)
            self.evaluation_is_due = state.get("evaluation_is_due", False)
            # Checkpoints of earlier versions have neither guards nor a best policy.
            if "guards" in state:
                self._guards.load_state_dict(state["guards"])
            # Another run's best policy refers to checkpoints that do not exist here.
            self.best.load_state_dict(self._if_comparable(state) if is_own else None)
        retention.set_aside_after(self._path, step if is_own else step - 1)
        self.best.write()
        self._complete = (step, self.best.state_dict())
        if is_own:
            self._saving = self._complete
        return step

    def save(self, step: int, *, evaluation_is_due: bool = False) -> None:
        """Start to save a checkpoint of `step` steps, once the previous save has ended; every rank must call this.

        The rollouts of these steps must be on disk, since a run that resumes from the checkpoint does not play them
        again. Once the checkpoint is complete, older checkpoints that need not be kept are removed.

        Args:
            evaluation_is_due: a run that resumes from this checkpoint first makes the evaluation after `step`.
        """
        self.finish_saving(is_last=False)
        self._phases.enter("checkpoint")
        best = self.best.state_dict()
        self._writer.start(
            step,
            policy=self._policy,
            optimizer=self._optimizer,
            schedule=self._schedule,
            state={
                "step": step,
                "settings": settings_of(self._config),
                "sampler": self._state.sampler.state_dict(),
                "test_questions": self._test_prompts.fingerprint,
                "guards": self._guards.state_dict(),
                "evaluation_is_due": evaluation_is_due,
                "best": best,
            },
            own_files=self._carried_file(),
            on_complete=functools.partial(self._tidy, step, best),
        )
        self._saving = (step, best)

    @property
    def saved_step(self) -> int:
        """Step of this run's newest checkpoint, including one being written; 0: none."""
        return self._saving[0]

    @property
    def longest_save_s(self) -> float:
        """Duration of the longest save of this start so far, seconds."""
        return self._writer.longest_s

    def finish_saving(self, *, is_last: bool = True) -> None:
        """Wait for the checkpoint being written, if any; every rank must call this, also before the program ends.

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
        if self.best.step == self._saving[0]:  # its save failed, so its weights do not exist
            self.best.load_state_dict(best_before)
        if is_last or self._num_failures >= self._config.checkpoint.max_failures:
            last = f"{self._path}/step_{step}" if step else "none; the next start begins at step 0"
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
        """Update best.json, then apply retention, so that best.json always names an existing checkpoint (rank 0)."""
        write_best(self._path, best)
        kept = self._config.checkpoint
        retention.drop_old(
            self._path,
            keep=kept.keep,
            keep_every=kept.keep_every,
            keep_gb=kept.keep_gb,
            spare=best["step"] if best else None,
        )
        drop_covered(self._bank, step)
        self._rollouts.trim(step)

    def _carried_file(self) -> dict[str, bytes]:
        """Return this rank's files for a checkpoint: the groups that its engine carries over, if any."""
        if not (self._config.rollout.partial.is_on and self._engine_group.is_leader):
            return {}
        return {carried_file(self._engine_group.index): encode(self._state.carried)}

    def _read_carried(self, path: Path, step: int, changed: dict[str, tuple[Any, Any]]) -> Carried:
        """Read a checkpoint's carried groups; drop, with a warning, those that the settings no longer allow."""
        try:
            held = read(path, num_engines=self._engine_group.count)
        except ValueError as error:
            raise ConfigError(f"--resume: {error}") from error
        partial = self._config.rollout.partial
        before = carried(held, engine=self._engine_group.index)
        young = bounded(before, step, max_groups=partial.extra_prompts, max_staleness=partial.max_staleness)
        keys = {entry.key for entry in young.entries}
        kept, dropped = follow_settings(
            [item for item in held if item.group.key in keys],
            config=self._config,
            prompts=self._train_prompts,
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
        return carried(kept, engine=self._engine_group.index)

    def _if_comparable(self, state: dict) -> dict | None:
        """Return the best policy in `state`, or None if later ones cannot be compared with it.

        The best policy's checkpoint may no longer exist, or its score may be for other held-out questions.

        Ranks may see different files on a network file system, but must agree on which checkpoints to save.
        """
        world = world_group()
        best, questions = state.get("best"), self._test_prompts.fingerprint
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
