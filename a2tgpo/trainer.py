"""The training loop: one step is the list of stages in `Trainer.train_step`."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from a2tgpo.advantage.step import step_advantages
from a2tgpo.assemble import RunParts, gain_check
from a2tgpo.batch.exchange import exchange
from a2tgpo.collect.bank import RolloutBank
from a2tgpo.collect.step import StepRollout
from a2tgpo.evaluate.evaluate import evaluate
from a2tgpo.lifecycle.stop_request import StopAgreed, StopRequest
from a2tgpo.lifecycle.watchdog import Watchdog
from a2tgpo.metrics.guards import Guards
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.metrics.timers import StageTimers
from a2tgpo.record.recorder import Recorder
from a2tgpo.refit.sync import sync_engine
from a2tgpo.run.early_stop import EarlyEnd
from a2tgpo.run.folder import RunFolder
from a2tgpo.update.minibatch import build_minibatches
from a2tgpo.update.policy_update import (
    compute_old_logprobs,
    compute_ref_logprobs,
    lay_out_ratios,
    update_policy,
)


class Trainer:
    """Runs the steps of one configuration; every rank has one and makes the same calls.

    Args:
        parts: of the run.
        recorder: writes metrics and rollouts.
        folder: saves the checkpoints.
        guards: check each step's metrics.
        step: steps already done, from the checkpoint that the run resumes.
        watchdog: receives stage changes; None disables it.
        stop: reports a requested stop, after which another start resumes bit for bit; None: the run is never stopped.
    """

    def __init__(
        self,
        parts: RunParts,
        recorder: Recorder,
        folder: RunFolder,
        guards: Guards,
        *,
        step: int = 0,
        watchdog: Watchdog | None = None,
        stop: StopRequest | None = None,
    ):
        self.parts = parts
        self.config = parts.config
        self.recorder = recorder
        self.step_rollout = StepRollout(parts)
        self.gain_check = gain_check(parts)
        self.bank = RolloutBank(folder.bank, parts)
        self.folder = folder
        self.guards, self.step = guards, step
        self.early_end = EarlyEnd(stop or StopRequest(), parts, folder, guards)
        self.timers = StageTimers(
            torch.cuda.synchronize if torch.cuda.is_available() else None,
            enter=watchdog.enter if watchdog else None,
        )

    def train(self) -> bool:
        """Run the remaining steps, evaluations and checkpoints; return False if stopped before the last step.

        The guards stop a run after the evaluation that is due and a checkpoint; started again, it stops before its
        first step. A requested stop (`early_end`) saves a checkpoint of the last finished step.
        """
        evaluation_is_due = self.folder.evaluation_is_due
        try:
            if self.step == 0 and self.config.evaluation.at_start:
                self.evaluate()
            if evaluation_is_due:
                self._evaluate_and_save(evaluation_is_due)
            while self.step < self.config.run.steps and not self.guards.stop_is_due:
                evaluation_is_due = False
                self.early_end.agree_before("refit", "rollout", "bank")
                metrics = self.train_step()
                evaluation_is_due = self._is_due(self.config.evaluation.every)
                alarms, lines = self.guards.watch(self.step, metrics)
                self.recorder.record_alarms(self.step, alarms, lines)
                self.folder.report_saving(self.recorder, self.step)
                self._evaluate_and_save(evaluation_is_due)
        except StopAgreed:
            with self.timers.stage("checkpoint"):
                self.early_end.save(self.step, evaluation_is_due=evaluation_is_due)
            return False
        self.folder.finish_saving()
        return self.step >= self.config.run.steps

    def _evaluate_and_save(self, evaluation_is_due: bool) -> None:
        """Run the evaluation and save the checkpoint that are due after a step."""
        is_best = evaluation_is_due and self.evaluate()
        is_stopping = self.guards.stop_is_due and self.step < self.config.run.steps
        if is_best or is_stopping or self._is_due(self.config.checkpoint.every):
            with self.timers.stage("checkpoint"):
                self.folder.save(self.step, self.parts, self.guards)
            self.recorder.writer.log(self.step, self.timers.take())

    def train_step(self) -> dict[str, float]:
        """Run one step: refit, rollout (with prompts, gain and reward), exchange, advantage, score, update, record.

        If a crash came after this step's rollout, the bank replaces refit and rollout.
        Returns the step's metrics, equal on all ranks.

        Raises:
            StopAgreed: on all ranks, before the first update; once updates began, the step is finished.
        """
        start = time.monotonic()
        engine_metrics, learning_metrics = MetricSums(), MetricSums()
        self.early_end.begin_step()
        with self.timers.stage("bank"):
            played = self.bank.take(self.step, engine_metrics)
        if played is None:
            with self.timers.stage("refit"):
                engine_metrics.merge(sync_engine(self.parts, step=self.step))
            with self.timers.stage("rollout"):
                played = self.step_rollout.play(
                    step=self.step, metrics=engine_metrics, is_cut=self.early_end.is_near
                )
            if played is not None:
                with self.timers.stage("bank"):
                    self.bank.put(self.step, played, engine_metrics)
        with self.timers.stage("exchange"):
            self.early_end.agree_before("score", "update", is_broken_off=played is None)
            assert played is not None, "a rollout that was broken off ends the run"
            trajectories = exchange(
                played, self.parts.groups, prompts_per_minibatch=self.config.update.prompts_per_minibatch
            )
        with self.timers.stage("advantage"):
            table, advantages, clip_scales = step_advantages(self.parts, trajectories)
            minibatches = build_minibatches(
                trajectories,
                advantages,
                clip_scales,
                config=self.config,
                groups=self.parts.groups,
                align=self.parts.policy.alignment,
            )
        with self.timers.stage("score"):
            self.parts.phases.enter("score")
            minibatches, metrics = compute_old_logprobs(
                self.parts.policy,
                minibatches,
                distribution=self.parts.distribution,
                before_each=lambda: self.early_end.agree_before("update"),
            )
            learning_metrics.merge(metrics)
            if self.parts.reference is not None:
                minibatches = compute_ref_logprobs(
                    self.parts.reference, minibatches, distribution=self.parts.distribution
                )
            learning_metrics.merge(self.gain_check.run(self.step, trajectories))
        with self.timers.stage("update"):
            self.early_end.agree_before("update")
            self.parts.phases.enter("update")
            metrics, turn_ratios = update_policy(
                self.parts.policy,
                self.parts.optimizer,
                self.parts.schedule,
                minibatches,
                self.config.algorithm,
                distribution=self.parts.distribution,
            )
            learning_metrics.merge(metrics)
            ratios = lay_out_ratios(self.parts.policy, turn_ratios, shape=clip_scales.shape)
        self.step += 1
        seconds = self.timers.take()
        self.early_end.finish_step(seconds)
        engine_metrics.merge(self.parts.phases.take_metrics())
        return self.recorder.record_step(
            self.step,
            trajectories,
            table,
            advantages,
            clip_scales,
            ratios,
            engine_metrics=engine_metrics,
            learning_metrics=learning_metrics,
            seconds=seconds | {"time/step_s": time.monotonic() - start},
        )

    def evaluate(self) -> bool:
        """Answer the held-out questions greedily; return whether this is the best score so far, to be saved."""
        with self.timers.stage("evaluation"):
            sync_engine(self.parts, step=self.step)
            everything, replicas = range(len(self.parts.test_prompts)), self.parts.replicas
            scores, _ = evaluate(
                self.parts.rollout,
                self.parts.test_prompts.prompts(everything, everything[replicas.index :: replicas.count]),
                is_replica_first=replicas.is_first,
                group=dist.group.WORLD,
                stop=self.early_end.request,
            )
        self.recorder.record_evaluation(self.step, scores, self.timers.take())
        return self.folder.best.offer(self.step, scores)

    def _is_due(self, every: int) -> bool:
        """Return True after the last step and after every `every` steps (0: only after the last)."""
        return self.step == self.config.run.steps or (every > 0 and self.step % every == 0)
