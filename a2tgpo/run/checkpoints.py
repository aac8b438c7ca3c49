"""Save and restore the checkpoints of a run, and track which checkpoint has the best policy."""

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
from a2tgpo.evaluate.sets import EvaluationSets
from a2tgpo.io.errors import ConfigError
from a2tgpo.loss.entropy import EntropyWeight
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
from a2tgpo.update.extrapolation_gate import ExtrapolationGate
from a2tgpo.update.optimizer import LearningRateSchedule

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves and restores the state of one run. Every rank has one object and makes the same calls.

    Args:
        folder: the folder of the run.
        policy, optimizer, schedule, entropy_weight, extrapolation_gate, state, guards: the objects whose state a
            checkpoint contains.
        phases: moves policy and optimizer to the GPU before a save or a load.
        train_prompts: the training questions, to which `state` refers.
        test_sets: the held-out questions, to which the best score refers.
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
        entropy_weight: EntropyWeight,
        extrapolation_gate: ExtrapolationGate,
        state: RolloutState,
        guards: Guards,
        phases: MemoryPhases,
        train_prompts: PromptSet,
        test_sets: EvaluationSets,
    ):
        self._config = config
        self._settings = settings_of(config)  # includes the digests that the files had when the run started
        self._groups = groups
        self._engine_group = engine_group
        self._policy, self._optimizer, self._schedule = policy, optimizer, schedule
        self._entropy_weight, self._extrapolation_gate = entropy_weight, extrapolation_gate
        self._state = state
        self._guards = guards
        self._phases = phases
        self._train_prompts, self._test_sets = train_prompts, test_sets
        self._path = folder.checkpoints
        self._bank = folder.bank
        self.best = BestCheckpoint(self._path, config.checkpoint.best_by, is_writer=groups.rank == 0)
        self._writer = CheckpointWriter(self._path, timeout_s=config.parallel.timeout_s)
        self._rollouts = RolloutRetention(folder.path, keep_gb=config.run.keep_rollouts_gb)
        self._complete: tuple[int, dict | None] = (0, None)
        """Step of the last complete checkpoint, and the best policy up to this step; 0 and None if there is none."""
        self._saving: tuple[int, dict | None] = self._complete
        self.evaluation_is_due = False
        """Whether the resumed run must begin with the evaluation that was due after the checkpoint's step. `restore`
        sets this value.
        """
        self.begins_elsewhere = False
        """Whether `restore` has loaded a checkpoint that is not in the run's own folder."""
        self._reported = 0
        self._num_failures = 0

    def restore(self, path: Path | None, *, is_auto: bool = False) -> int:
        """Load the checkpoint at `path`, and return the number of steps that the run has done.

        This run's checkpoints of later steps are moved to another folder. If `path` belongs to another run, this
        run's checkpoint of the same step is moved, too. The run then has no best policy yet.

        Args:
            path: the checkpoint, or None for a new run, which has done 0 steps.
            is_auto: if True and the checkpoint is damaged, load the newest earlier checkpoint that is undamaged.
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
            # The checkpoint of a converted model has no sampler state.
            if "sampler" in state:
                self._state.sampler.load_state_dict(state["sampler"])
            is_own = path.resolve() == (self._path / f"step_{step}").resolve()
            changed = changed_settings(state, self._settings)
            if changed and not is_own and self._groups.rank == 0:
                logger.warning(
                    "the run starts with other settings than %s: %s", path, describe_changes(changed)
                )
            self._state.carried = self._read_carried(path, step, changed)
            self.evaluation_is_due = state.get("evaluation_is_due", False)
            # A checkpoint of an earlier version may lack the following states, or a best policy.
            if "entropy_weight" in state:
                self._entropy_weight.load_state_dict(state["entropy_weight"])
            if "extrapolation_gate" in state:
                self._extrapolation_gate.load_state_dict(state["extrapolation_gate"])
            if "guards" in state:
                self._guards.load_state_dict(state["guards"])
            # Another run's record of its best policy names a checkpoint that this run does not have.
            self.best.load_state_dict(self._if_comparable(state) if is_own else None)
        self.begins_elsewhere = not is_own
        retention.set_aside_after(self._path, step if is_own else step - 1)
        self.best.write()
        self._complete = (step, self.best.state_dict())
        if is_own:
            self._saving = self._complete
        return step

    def save(self, step: int, *, evaluation_is_due: bool = False) -> None:
        """Wait for the previous save, then start to save the checkpoint of step `step`; every rank must call this.

        The recorded rollouts up to this step must be on disk, because a resumed run does not play them again.
        Once the checkpoint is complete, retention removes older checkpoints.

        Args:
            evaluation_is_due: whether a run that resumes from this checkpoint must begin with the evaluation due
                after `step`.
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
                "settings": self._settings,
                "sampler": self._state.sampler.state_dict(),
                "test_questions": self._test_sets.fingerprint,
                "entropy_weight": self._entropy_weight.state_dict(),
                "extrapolation_gate": self._extrapolation_gate.state_dict(),
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
        """The step of this run's newest checkpoint, whose save may still be in progress; 0 if there is none."""
        return self._saving[0]

    @property
    def longest_save_s(self) -> float:
        """Duration in seconds of the longest save in this process."""
        return self._writer.longest_s

    def finish_saving(self, *, is_last: bool = True) -> None:
        """If a save is in progress, wait for its end. Every rank must call this before the program ends.

        Args:
            is_last: whether this save is the last of the program.

        Raises:
            RuntimeError: with a one-line message, if the last save or `checkpoint.max_failures` saves in a row
                failed.
        """
        fault = self._writer.wait()
        if fault is None:
            return
        if not fault:
            self._num_failures, self._complete = 0, self._saving
            return
        self._num_failures += 1
        step, best_before = self._complete
        if self.best.step == self._saving[0]:  # the best weights were in the save that failed
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
        """If this rank knows of a failed save that has not been reported yet, report the failure."""
        fault = self._writer.outcome
        if fault and self._reported != self._saving[0]:
            self._reported = self._saving[0]
            recorder.record_failed_save(
                step, f"the checkpoint of step {self._reported} could not be written: {fault}"
            )

    def _tidy(self, step: int, best: dict | None) -> None:
        """Write best.json, and then remove old checkpoints and rollouts; only rank 0 calls this.

        Because of this order, best.json always names a checkpoint that exists.
        """
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
        """Return the files that this rank adds to a checkpoint, by path.

        With partial rollouts, the leader of each engine adds one file with the groups that its engine carries over.
        """
        if not (self._config.rollout.partial.is_on and self._engine_group.is_leader):
            return {}
        return {carried_file(self._engine_group.index): encode(self._state.carried)}

    def _read_carried(self, path: Path, step: int, changed: dict[str, tuple[Any, Any]]) -> Carried:
        """Return a checkpoint's carried groups, except those that the present settings no longer allow."""
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
        """Return the best policy in `state`, or None if its checkpoint is missing or data.test has changed.

        Ranks may see different files on a network file system, so all ranks use what rank 0 finds.
        """
        world = world_group()
        best, questions = state.get("best"), self._test_sets.fingerprint
        if best is not None and state.get("test_questions", questions) != questions:
            if self._groups.rank == 0:
                logger.warning(
                    "the evaluation questions have changed since step %d: the best checkpoint so far, step %d, "
                    "is no longer compared",
                    state["step"],
                    best["step"],
                )
            best = None
        is_there = best is not None and self.best.has_weights(best["step"])
        return broadcast_object(best if is_there else None, world, source=0)
