"""The training loop. `Trainer.train_step` lists the stages of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from a2tgpo.advantage.step import step_advantages
from a2tgpo.assemble import RunParts, build_context_scorer
from a2tgpo.batch.exchange import exchange
from a2tgpo.collect.bank import RolloutBank
from a2tgpo.collect.rewarded_rollout import RewardedRollout
from a2tgpo.collect.step import StepRollout
from a2tgpo.collect.unjudged import require_verdicts, split
from a2tgpo.evaluate.evaluate import evaluate
from a2tgpo.lifecycle.stop_request import StopAgreed, StopRequest
from a2tgpo.lifecycle.watchdog import Watchdog
from a2tgpo.metrics.guards import Guards
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.metrics.timers import StageTimers
from a2tgpo.record.profiler import StepProfiler
from a2tgpo.record.recorder import Recorder
from a2tgpo.refit.sync import sync_engine
from a2tgpo.reward.info_gain import set_gains
from a2tgpo.run.checkpoints import RunCheckpoints
from a2tgpo.run.early_stop import EarlyStop
from a2tgpo.run.folder import RunFolder
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.gain_check import GainCheck
from a2tgpo.update.minibatch import build_minibatches
from a2tgpo.update.policy_update import (
    compute_old_logprobs,
    compute_ref_logprobs,
    lay_out_ratios,
    update_policy,
)
from a2tgpo.update.routing_check import routing_metrics


class Trainer:
    """Runs the training steps of a run. Every rank has one trainer and makes the same calls.

    Args:
        recorder: writes metrics and rollouts.
        checkpoints: saves the state of `parts` and `guards`.
        guards: checks the metrics of each step.
        folder: the run's folder, which has the rollout bank and the profiles.
        step: the number of steps that the run has already done.
        startup: metrics of the start-up of this process. They are reported with its first rollout.
        watchdog: limits the time of each stage. None: no limits.
        stop: reports a requested stop. The next start continues the run bit for bit as if it had not stopped. None:
            the run never stops early.
    """

    def __init__(
        self,
        parts: RunParts,
        recorder: Recorder,
        checkpoints: RunCheckpoints,
        guards: Guards,
        *,
        folder: RunFolder,
        step: int = 0,
        startup: dict[str, float] | None = None,
        watchdog: Watchdog | None = None,
        stop: StopRequest | None = None,
    ):
        self.parts = parts
        self.config = parts.config
        self.recorder = recorder
        self.checkpoints = checkpoints
        self.guards, self.step = guards, step
        self.early_stop = EarlyStop(stop or StopRequest(), parts.state, parts.rollout.outage, checkpoints)
        self.profiler = StepProfiler(
            parts.config.profile, folder.profile, parts.phases, rank=parts.groups.rank
        )
        self.bank = RolloutBank(
            folder.bank,
            parts.config,
            parts.state,
            parts.groups,
            parts.engine_group,
            questions=parts.train_prompts.content_fingerprint,
        )
        self.step_rollout = StepRollout(
            parts.config.rollout,
            RewardedRollout(
                parts.rollout,
                parts.reward,
                parts.reward_pool,
                seed=parts.config.run.seed,
                score_gain=parts.config.engine_scores_gain,
                should_stop=self.early_stop.should_stop,
                engine_group=parts.engine_group,
            ),
            parts.train_prompts,
            parts.state,
            parts.engine_group,
            startup=startup,
        )
        self.context_scorer = build_context_scorer(parts)
        self.gain_check = GainCheck(parts.policy, parts.config.rollout.gain, self.context_scorer)
        self.timers = StageTimers(
            torch.cuda.synchronize if torch.cuda.is_available() else None,
            enter=watchdog.enter if watchdog else None,
        )

    def train(self) -> bool:
        """Run the remaining steps, evaluations and saves; return False if the run stopped before its last step.

        If the guards stop the run, the run first makes any evaluation that is due, and saves a checkpoint. Another
        start would stop again before its first step. If a stop is requested, a checkpoint of the last finished step
        is saved.
        """
        evaluation_is_due = self.checkpoints.evaluation_is_due
        try:
            if self.checkpoints.begins_elsewhere:
                # If the run were killed before its first checkpoint, the next start would begin at model.path.
                with self.timers.stage("checkpoint"):
                    self._save(evaluation_is_due=evaluation_is_due)
            if self.step == 0 and self.config.evaluation.at_start:
                self.evaluate()
            if evaluation_is_due:
                self._evaluate_and_save(evaluation_is_due)
            while self.step < self.config.run.steps and not self.guards.stop_is_due:
                evaluation_is_due = False
                self.early_stop.agree_before("refit", "rollout", "bank")
                with self.profiler.step(self.step + 1):
                    metrics = self.train_step()
                evaluation_is_due = self._is_due(self.config.evaluation.every)
                self.parts.entropy_weight.follow(metrics.get("entropy/mean", math.nan))
                alarms, lines = self.guards.watch(self.step, metrics)
                self.recorder.record_alarms(self.step, alarms, lines)
                self.checkpoints.report_saving(self.recorder, self.step)
                self._evaluate_and_save(evaluation_is_due)
        except StopAgreed:
            with self.timers.stage("checkpoint"):
                self.early_stop.rewind()
                self.checkpoints.finish_saving(is_last=False)
                if self.checkpoints.saved_step != self.step:
                    self._save(evaluation_is_due=evaluation_is_due)
                self.checkpoints.finish_saving()
            return False
        self.checkpoints.finish_saving()
        return self.step >= self.config.run.steps

    def _evaluate_and_save(self, evaluation_is_due: bool) -> None:
        """After a step, run the evaluation if it is due, and save a checkpoint if one is due."""
        is_best = evaluation_is_due and self.evaluate()
        is_stopping = self.guards.stop_is_due and self.step < self.config.run.steps
        if is_best or is_stopping or self._is_due(self.config.checkpoint.every):
            with self.timers.stage("checkpoint"):
                self._save()
            self.recorder.writer.log(self.step, self.timers.take())

    def _save(self, *, evaluation_is_due: bool = False) -> None:
        self.recorder.finish_rollouts()
        self.checkpoints.save(self.step, evaluation_is_due=evaluation_is_due)

    def train_step(self) -> dict[str, float]:
        """Run one step, and return its metrics. The metrics are equal on all ranks.

        The stages are refit, rollout (which includes gain and reward), exchange, advantage, score, update and record.
        If an earlier start crashed after the rollout of this step, the rollout is read from the bank, and the stages
        refit and rollout are left out.

        Raises:
            StopAgreed: on all ranks, if a stop was requested before the first update. If the request comes later, the
                step is finished.
        """
        start = time.monotonic()
        learning_metrics = MetricSums()
        self.early_stop.begin_step()
        with self.timers.stage("bank"):
            self.parts.phases.enter("bank")
            played = self.bank.take(self.step + 1, self.parts.policy)
        if played is None:
            with self.timers.stage("refit"):
                refit_metrics = self._refit()
            with self.timers.stage("rollout"):
                played = self.step_rollout.play(version=self.step)
            if played is not None:
                played.metrics.merge(refit_metrics)
                with self.timers.stage("bank"):
                    self.bank.put(self.step + 1, played)
        with self.timers.stage("exchange"):
            self.early_stop.agree_before("score", "update", is_interrupted=played is None)
            assert played is not None, "an interrupted rollout ends the run"
            require_verdicts(played.trajectories, max_share=self.config.reward.max_failed_share)
            trajectories, unjudged = split(
                exchange(
                    played.trajectories,
                    self.parts.groups,
                    prompts_per_minibatch=self.config.update.prompts_per_minibatch,
                )
            )
        with self.timers.stage("score"):
            self._score_gains(trajectories)
        with self.timers.stage("advantage"):
            table, advantages, clip_scales = step_advantages(trajectories, self.config, self.parts.groups)
            minibatches = build_minibatches(
                trajectories,
                advantages,
                clip_scales,
                config=self.config,
                groups=self.parts.groups,
                align=self.parts.policy.alignment,
                contrast_prompts=self._contrast_prompts(trajectories),
                expert_shape=self.parts.policy.expert_shape,
            )
        with self.timers.stage("score"):
            self.parts.phases.enter("score")
            # The first mini-batch gets its old log-probs from its training pass.
            later, metrics = compute_old_logprobs(
                self.parts.policy,
                minibatches[1:],
                distribution=self.parts.distribution,
                before_each=lambda: self.early_stop.agree_before("update"),
            )
            minibatches = [minibatches[0], *later]
            learning_metrics.merge(metrics)
            learning_metrics.merge(
                routing_metrics(self.parts.policy, minibatches, distribution=self.parts.distribution)
            )
            if self.parts.reference is not None and self.config.algorithm.kl_coef > 0:
                minibatches = compute_ref_logprobs(
                    self.parts.reference, minibatches, distribution=self.parts.distribution
                )
            learning_metrics.merge(self.gain_check.run(self.step, trajectories))
        with self.timers.stage("update"):
            self.early_stop.agree_before("update")
            self.parts.phases.enter("update")
            metrics, turn_ratios = update_policy(
                self.parts.policy,
                self.parts.optimizer,
                self.parts.schedule,
                minibatches,
                self.config.algorithm,
                distribution=self.parts.distribution,
                entropy_weight=self.parts.entropy_weight.value,
                extrapolation=self.parts.extrapolation,
            )
            learning_metrics.merge(metrics)
            ratios = lay_out_ratios(self.parts.policy, turn_ratios, shape=clip_scales.shape)
        self.step += 1
        seconds = self.timers.take()
        self.early_stop.finish_step(seconds)
        engine_metrics = played.metrics
        engine_metrics.merge(self.parts.phases.take_metrics())
        return self.recorder.record_step(
            self.step,
            trajectories,
            table,
            advantages,
            clip_scales,
            ratios,
            unjudged=unjudged,
            engine_metrics=engine_metrics,
            learning_metrics=learning_metrics,
            seconds=seconds | {"time/step_s": time.monotonic() - start},
        )

    def _contrast_prompts(self, trajectories: Sequence[Trajectory]) -> dict[str, tuple[int, ...]] | None:
        """Return the contrast prompts of the trajectories' questions, or None if the run has none."""
        prompts = self.parts.contrast_prompts
        return None if prompts is None else prompts.tokens_of(t.prompt_id for t in trajectories)

    def evaluate(self) -> bool:
        """Answer the held-out questions, and return whether the score is the best so far.

        If it is the best, the caller must save a checkpoint.
        """
        with self.timers.stage("evaluation"):
            self._refit()
            scores = evaluate(
                self.parts.rollout,
                self.parts.test_sets,
                self.parts.engine_group,
                num_samples=self.config.evaluation.samples,
                seed=self.config.run.seed,
                rewards=self.parts.reward_pool,
                stop=self.early_stop,
            )
        self.recorder.record_evaluation(self.step, scores, self.timers.take())
        return self.checkpoints.best.offer(self.step, scores)

    def _score_gains(self, trajectories: Sequence[Trajectory]) -> None:
        """If the reference is the scorer, set the gains of this replica's share of the step's trajectories."""
        gain = self.config.rollout.gain
        if gain.scorer == "reference":
            assert self.parts.reference is not None, "a run with this scorer has a reference"
            self.parts.phases.enter("score")
            scored = self.context_scorer.score(self.parts.reference, trajectories)
            for trajectory, logprobs in zip(trajectories, scored, strict=True):
                set_gains(trajectory, logprobs, measure=gain.measure)

    def _refit(self) -> MetricSums:
        return sync_engine(
            self.parts.policy, self.parts.engine, self.parts.phases, self.config, version=self.step
        )

    def _is_due(self, every: int) -> bool:
        """Return whether the present step is the last one or, if `every` > 0, a multiple of `every`."""
        return self.step == self.config.run.steps or (every > 0 and self.step % every == 0)
