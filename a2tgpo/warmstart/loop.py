"""Run a warm start: train, compute held-out losses, save checkpoints, and export the model at the end."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from a2tgpo.batch.packing import PackedBatch
from a2tgpo.config.load import flat_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.lifecycle.stop_request import StopAgreed, StopRequest
from a2tgpo.lifecycle.watchdog import Watchdog
from a2tgpo.metrics.timers import StageTimers
from a2tgpo.model.build import build_policy
from a2tgpo.model.weights import save_hf
from a2tgpo.parallel.collectives import all_reduce_sum, from_last_stage
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.run.versions import commit_line
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.train_step import train_step
from a2tgpo.warmstart.batches import asked_for, cross_entropy, my_microbatches, token_weights
from a2tgpo.warmstart.examples import load_examples
from a2tgpo.warmstart.folder import WarmStartFolder
from a2tgpo.warmstart.report import Report
from a2tgpo.warmstart.settings import cold_model, learning_rate, source_dimensions, update_settings
from a2tgpo.warmstart.target import MARKER, require_target, target_of


class WarmStart:
    """Runs the warm start of one configuration. Every rank has one object and makes the same calls.

    Args:
        date: the date that the prompts give as today's.
        checkpoint: the checkpoint to resume from. None: begin at step 0.
        folder: saves the checkpoints.
        stop: reports a requested stop.
        watchdog: limits the time of each stage.

    Raises:
        ConfigError: with a one-line message, if the configuration or its data are unusable for training.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ParallelGroups,
        *,
        date: datetime.date,
        checkpoint: Path | None,
        folder: WarmStartFolder,
        stop: StopRequest,
        watchdog: Watchdog,
    ):
        self.config, self.settings = config, config.warmstart
        self.groups, self.folder, self.stop = groups, folder, stop
        self.examples = load_examples(config, date=date)
        self.sampler = PromptSampler(len(self.examples.trained), self.settings.batch_size, config.run.seed)
        lr = learning_rate(config, source_dimensions(config))
        update = update_settings(config, lr=lr)
        self.policy = build_policy(cold_model(config), config.parallel, groups, update=update)
        self.optimizer, self.schedule = build_optimizer(self.policy, update, total_steps=self.settings.steps)
        self.step = self._restore(checkpoint) if checkpoint else 0
        self.timers = StageTimers(
            torch.cuda.synchronize if torch.cuda.is_available() else None, enter=watchdog.enter
        )
        self.report = Report(
            folder.path,
            out=config.model.path,
            steps=self.settings.steps,
            step=self.step,
            enabled=groups.rank == 0,
        )
        self._longest_step_s = self._longest_evaluation_s = 0.0
        self._num_skipped = 0
        self.report.say_begin(
            f"warm start: step {self.step} of {self.settings.steps} on {groups.world_size} ranks, peak learning rate "
            f"{lr:.3g}, {len(self.examples.trained)} demonstrations, {len(self.examples.held_out)} held out"
        )

    def train(self) -> bool:
        """Run the remaining steps and write the model.

        Return False if a requested stop ended the training early. A checkpoint is then saved instead of the model.
        """
        try:
            if self.step == 0:
                self._evaluate()
            while self.step < self.settings.steps:
                self.stop.agree(self.stop.should_stop(needed_s=self._needed_s()))
                self._train_step()
                if self._is_due(self.settings.evaluate_every, self.step):
                    self._evaluate()
                if self._is_due(self.settings.checkpoint_every, self.step):
                    self._save()
        except StopAgreed as stopped:
            if self.folder.saved_step != self.step:
                self._save()
            self.folder.finish_saving()
            self.report.say_stopped(self.step, str(stopped))
            return False
        self.folder.finish_saving()
        self._export()
        self.report.say_done()
        return True

    def _train_step(self) -> None:
        begin = time.monotonic()
        with self.timers.stage("update"):
            chosen = [self.examples.trained[index] for index in self.sampler.next_indices()]
            batches = self._pack(chosen)
            weights = token_weights(batches, chosen, observation_weight=self.settings.observation_weight)
            result = train_step(
                self.policy, self.optimizer, asked_for(batches, weights), cross_entropy(weights)
            )
        self.step += 1
        self.report.add(self.step, chosen, loss=result.loss, grad_norm=result.grad_norm, lr=self.schedule.lr)
        self._num_skipped = 0 if result.update_ok else self._num_skipped + 1
        if result.update_ok:
            self.schedule.step()
        elif self._num_skipped == self.config.guard.stop_after_skipped:
            raise RuntimeError(
                f"a non-finite update was skipped in {self._num_skipped} steps in a row, up to step "
                f"{self.step} (guard.stop_after_skipped); lower warmstart.lr, or check "
                f"{self.settings.demonstrations}"
            )
        self._longest_step_s = max(self._longest_step_s, time.monotonic() - begin)

    def _pack(self, chosen: Sequence[Trajectory]) -> list[PackedBatch]:
        return my_microbatches(chosen, self.policy, max_tokens=self.config.update.max_microbatch_tokens)

    def _needed_s(self) -> float:
        """Return the longest times so far, in seconds, of the next step, the evaluation after it, and a save."""
        is_evaluated = self._is_due(self.settings.evaluate_every, self.step + 1)
        evaluation_s = self._longest_evaluation_s if is_evaluated else 0.0
        return self._longest_step_s + evaluation_s + self.folder.longest_save_s

    def _evaluate(self) -> None:
        if not self.examples.held_out:
            return
        begin = time.monotonic()
        with self.timers.stage("evaluation"):
            loss = self._held_out_loss()
        self.report.add_held_out(self.step, loss)
        self._longest_evaluation_s = max(self._longest_evaluation_s, time.monotonic() - begin)

    def _held_out_loss(self) -> float:
        """Return the mean cross-entropy of the tokens that the policy should write in the held-out examples."""
        held_out, size = self.examples.held_out, self.settings.batch_size
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for start in range(0, len(held_out), size):
            for scores in compute_logprobs(self.policy, self._pack(held_out[start : start + size])):
                if scores is not None:
                    total -= scores.logprobs.double().sum()
        loss = from_last_stage(all_reduce_sum(total, self.groups.dp_group).item(), self.groups)
        return loss / max(1, sum(trajectory.num_sampled_tokens for trajectory in held_out))

    def _save(self) -> None:
        with self.timers.stage("checkpoint"):
            self.folder.save(
                self.step,
                policy=self.policy,
                optimizer=self.optimizer,
                schedule=self.schedule,
                state={"sampler": self.sampler.state_dict(), **self.examples.fingerprints},
            )

    def _restore(self, checkpoint: Path) -> int:
        state = self.folder.restore(
            checkpoint, policy=self.policy, optimizer=self.optimizer, schedule=self.schedule
        )
        self.examples.require_same(state, checkpoint=checkpoint, file=self.settings.demonstrations)
        self.sampler.load_state_dict(state["sampler"])
        return int(state["step"])

    def _export(self) -> None:
        """Write the model to model.path, and then remove the checkpoints."""
        with self.timers.stage("export"):
            require_target(self.config)  # another program may have written to the folder
            settings = {
                key: value for key, value in flat_config(self.config).items() if key.startswith("warmstart.")
            }
            record = {"commit": commit_line(), "settings": settings}
            save_hf(
                self.policy,
                str(target_of(self.config)),
                chat_template=self.config.data.chat_template,
                records={MARKER: record},
            )
            self.folder.remove_checkpoints()

    def _is_due(self, every: int, step: int) -> bool:
        """Return whether `step` is the last one or, if `every` > 0, a multiple of `every`."""
        return step == self.settings.steps or (every > 0 and step % every == 0)
