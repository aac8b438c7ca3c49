"""The training loop: one step is the list of stages in `Trainer.train_step`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable, build_turn_table
from a2tgpo.assemble import RunParts
from a2tgpo.batch.exchange import exchange
from a2tgpo.evaluate.evaluate import evaluate
from a2tgpo.loss.adaptive_clip import clip_scale
from a2tgpo.metrics.guards import Guards
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.metrics.timers import StageTimers
from a2tgpo.recorder import Recorder
from a2tgpo.rollout.answer_tokens import AnswerTokens
from a2tgpo.rollout_bank import RolloutBank
from a2tgpo.run_folder import RunFolder
from a2tgpo.step_rollout import StepRollout
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.gain_check import GainCheck
from a2tgpo.update.minibatch import build_minibatches
from a2tgpo.update.policy_update import score_minibatches, score_reference, turn_ratios, update_policy
from a2tgpo.watchdog import Watchdog
from a2tgpo.weight_sync import sync_engine


class Trainer:
    """Runs the steps of one configuration; every rank holds one and makes the same calls.

    Args:
        parts: what the run is made of.
        recorder: of metrics and rollouts.
        folder: keeps the checkpoints.
        guards: watches each step's metrics.
        step: steps done already, those of the checkpoint the run goes on from.
        watchdog: told of every stage; None: nobody watches.
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
    ):
        self.parts = parts
        self.config = parts.config
        self.recorder = recorder
        self.step_rollout = StepRollout(parts)
        self.gain_check = GainCheck(
            parts.policy,
            parts.config.rollout.gain,
            answer_tokens=AnswerTokens(parts.tokenizer, parts.config.rollout.gain),
            answers={question.id: question.answers for question in parts.train_prompts.questions},
            max_tokens=parts.config.update.max_microbatch_tokens,
        )
        self.bank = RolloutBank(folder.bank, parts)
        self.folder = folder
        self.guards = guards
        self.step = step
        self.timers = StageTimers(
            torch.cuda.synchronize if torch.cuda.is_available() else None,
            enter=watchdog.enter if watchdog else None,
        )

    def train(self) -> bool:
        """The remaining steps, with evaluations and checkpoints between them; False: stopped before the last one.

        The guards stop a run after the evaluation that is due at that step, if any, and a checkpoint. A run that goes
        on from where it was stopped stops again before its first step.
        """
        if self.step == 0 and self.config.evaluation.at_start:
            self.evaluate()
        while self.step < self.config.run.steps and not self.guards.stop_is_due:
            metrics = self.train_step()
            alarms, lines = self.guards.watch(self.step, metrics)
            self.recorder.record_alarms(self.step, alarms, lines)
            self.folder.report_saving(self.recorder, self.step)
            is_stopping = self.guards.stop_is_due and self.step < self.config.run.steps
            is_best = self._is_due(self.config.evaluation.every) and self.evaluate()
            if is_best or is_stopping or self._is_due(self.config.checkpoint.every):
                with self.timers.stage("checkpoint"):
                    self.folder.save(self.step, self.parts, self.guards)
                self.recorder.writer.log(self.step, self.timers.take())
        self.folder.finish_saving()
        return self.step >= self.config.run.steps

    def train_step(self) -> dict[str, float]:
        """refit, rollout (with prompts, gain and reward), exchange, advantage, score, update, record.

        A step whose rollouts were finished before a crash takes them from the bank instead of the first two.
        Returns the step's metrics, equal on all ranks.
        """
        start = time.monotonic()
        engine_metrics, learning_metrics = MetricSums(), MetricSums()
        with self.timers.stage("bank"):
            played = self.bank.take(self.step, engine_metrics)
        if played is None:
            with self.timers.stage("refit"):
                engine_metrics.merge(sync_engine(self.parts, step=self.step))
            with self.timers.stage("rollout"):
                played = self.step_rollout.play(step=self.step, metrics=engine_metrics)
            with self.timers.stage("bank"):
                self.bank.put(self.step, played, engine_metrics)
        with self.timers.stage("exchange"):
            trajectories = exchange(
                played, self.parts.groups, prompts_per_minibatch=self.config.update.prompts_per_minibatch
            )
        with self.timers.stage("advantage"):
            table, advantages, clip_scales = self.advantages(trajectories)
            minibatches = build_minibatches(
                trajectories, advantages, clip_scales, config=self.config, groups=self.parts.groups
            )
        with self.timers.stage("score"):
            score_minibatches(self.parts.policy, minibatches, learning_metrics)
            if self.parts.reference is not None:
                score_reference(self.parts.reference, minibatches)
            self.gain_check.run(self.step, trajectories, learning_metrics)
        with self.timers.stage("update"):
            update_policy(
                self.parts.policy,
                self.parts.optimizer,
                self.parts.schedule,
                minibatches,
                self.config.algorithm,
                learning_metrics,
            )
            ratios = turn_ratios(self.parts.policy, minibatches, shape=clip_scales.shape)
        self.step += 1
        return self.recorder.record_step(
            self.step,
            trajectories,
            table,
            advantages,
            clip_scales,
            ratios,
            engine_metrics=engine_metrics,
            learning_metrics=learning_metrics,
            seconds=self.timers.take() | {"time/step_s": time.monotonic() - start},
        )

    def advantages(
        self, trajectories: Sequence[Trajectory]
    ) -> tuple[TurnTable, TurnAdvantages, torch.Tensor]:
        """Turn advantages and clip scales [N, T + 1] of this replica's trajectories.

        Group statistics are merged over all replicas: every rank must call this.
        """
        table = build_turn_table(
            trajectories,
            num_prompts=self.config.rollout.prompts_per_step,
            max_turns=self.config.rollout.max_turns,
        )
        result = compute_advantages(table, self.config.algorithm, dp_group=self.parts.groups.dp_group)
        gains = torch.nn.functional.pad(result.normalized_gain, (0, 1))  # the final turn is neutral
        return table, result, clip_scale(gains, beta=self.config.algorithm.clip_beta)

    def evaluate(self) -> bool:
        """Greedy answers to the held-out questions; True: the best so far, whose checkpoint is to be saved."""
        with self.timers.stage("evaluation"):
            sync_engine(self.parts, step=self.step)
            prompts = self.parts.test_prompts.prompts(range(len(self.parts.test_prompts)))
            scores, _ = evaluate(
                self.parts.rollout,
                prompts,
                replica_index=self.parts.replicas.index,
                num_replicas=self.parts.replicas.count,
                is_replica_first=self.parts.replicas.is_first,
                group=dist.group.WORLD,
            )
            self.parts.engine.sleep()
        self.recorder.record_evaluation(self.step, scores, self.timers.take())
        return self.folder.best.offer(self.step, scores)

    def _is_due(self, every: int) -> bool:
        """After the last step, and every so many steps (0: never in between)."""
        return self.step == self.config.run.steps or (every > 0 and self.step % every == 0)
