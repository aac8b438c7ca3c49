"""Record a step: the metrics of all ranks, the rollouts, histograms and texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.metrics.host_memory import resident_bytes, return_free_memory
from a2tgpo.metrics.ratio_noise import RatioNoise
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.metrics.slow_ranks import SlowRanks
from a2tgpo.metrics.writer import MetricWriter
from a2tgpo.parallel.collectives import all_gather_object, broadcast_object, world_group
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.record.advantage_metrics import add_advantage_metrics
from a2tgpo.record.rollout_metrics import SIGNAL_METRICS, add_rollout_metrics, with_deviations
from a2tgpo.record.rollout_record import as_text, to_record
from a2tgpo.record.rollout_summary import best_and_worst, gains_by_turn, gather_summaries, gather_texts
from a2tgpo.record.rollout_writer import RolloutWriter
from a2tgpo.trajectory import Trajectory


class Recorder:
    """Gather metrics from all ranks and write them on rank 0.

    The first rank of every replica writes the replica's rollouts.

    Args:
        writer: the metric writer, which is enabled only on rank 0.
        num_texts: number of a step's rollouts to show in TensorBoard. Half of them are the best rollouts, and half
            are the worst.
    """

    def __init__(
        self,
        writer: MetricWriter,
        run_dir: Path,
        *,
        groups: ParallelGroups,
        tokenizer: PreTrainedTokenizerBase,
        num_texts: int,
        slow_ranks: SlowRanks,
        ratio_noise: RatioNoise,
        turn_signal: str = "gain",
    ):
        self.writer = writer
        self._rollouts = RolloutWriter(
            run_dir, replica=groups.dp_rank, num_replicas=groups.dp_size, tokenizer=tokenizer
        )
        self._groups = groups
        self._tokenizer = tokenizer
        self._num_texts = num_texts
        self._slow_ranks = slow_ranks
        self._ratio_noise = ratio_noise
        self._turn_signal = turn_signal

    def record_step(
        self,
        step: int,
        trajectories: Sequence[Trajectory],
        table: TurnTable,
        advantages: TurnAdvantages,
        clip_scales: torch.Tensor,
        ratios: torch.Tensor,
        *,
        unjudged: Sequence[Trajectory] = (),
        engine_metrics: MetricSums,
        learning_metrics: MetricSums,
        seconds: dict[str, float],
    ) -> dict[str, float]:
        """Write the record of one training step. Every rank must call this.

        Args:
            trajectories: this replica's share of the step's trajectories. They are the rows of `table`, `advantages`,
                `clip_scales` and `ratios` [N, T + 1].
            unjudged: this replica's trajectories on which the step does not train, because a reward could not judge
                them. They are in the recorded rollouts, but not in the metrics.
            engine_metrics: metrics of this rank's engine, to be reduced over all ranks.
            learning_metrics: metrics of this replica's trajectories, to be reduced over the data-parallel group.
            seconds: wall time of each stage on this rank as `time/STAGE_s`, and of the step as `time/step_s`.

        Returns:
            All metrics of the step except `seconds`. They are equal on all ranks.
        """
        add_rollout_metrics(learning_metrics, trajectories, turn_signal=self._turn_signal)
        add_advantage_metrics(learning_metrics, table, advantages, clip_scales)
        return_free_memory()
        engine_metrics.add_max("memory/host_gib", resident_bytes() / 2**30)
        if failures := self._rollouts.take_failures():
            engine_metrics.add("rollout/not_recorded", failures, 0)
        world = world_group()
        metrics = engine_metrics.reduce(world) | with_deviations(
            learning_metrics.reduce(self._groups.dp_group)
        )
        metrics["speed/tokens_per_s"] = metrics["speed/sampled_tokens"] / seconds["time/step_s"]
        # Broadcast the result, because all ranks must base their decisions on exactly equal values.
        metrics = broadcast_object(metrics, world, source=0)
        noise, noise_line = self._ratio_noise.watch(metrics)
        metrics |= noise
        spread, slow_line = self._slow_ranks.compare(all_gather_object(seconds, world))
        if self._groups.is_replica_first:
            turn_values = {"advantage": advantages.advantages, "clip_scale": clip_scales, "ratio": ratios}
            self._record_rollouts(step, trajectories, turn_values, unjudged)
        self.writer.log(step, metrics | seconds | spread)
        for line in filter(None, (noise_line, slow_line)):
            self.writer.print(f"step {step}: {line}")
        return metrics

    def _record_rollouts(
        self,
        step: int,
        trajectories: Sequence[Trajectory],
        turn_values: dict[str, torch.Tensor],
        unjudged: Sequence[Trajectory],
    ) -> None:
        """Start writing this replica's rollouts. On rank 0, also show rollouts of all replicas in TensorBoard."""

        def text_of(row: int) -> str:
            return as_text(to_record(trajectories[row], turn_values, row, tokenizer=self._tokenizer))

        summaries = gather_summaries(trajectories, self._groups, turn_signal=self._turn_signal)
        chosen = best_and_worst(summaries, self._num_texts)
        texts = gather_texts(chosen, trajectories, text_of, self._groups)
        missing = (0, 0, 0, len(unjudged))  # rows of NaN, which a record shows as null
        padded = {
            name: torch.nn.functional.pad(values, missing, value=torch.nan)
            for name, values in turn_values.items()
        }
        self._rollouts.start(step, [*trajectories, *unjudged], padded)
        if self.writer.enabled:
            signal = SIGNAL_METRICS[self._turn_signal]
            for turn_index, gains in gains_by_turn(summaries).items():
                self.writer.log_histogram(step, f"{signal}/turn_{turn_index}", gains)
            for name, text in texts.items():
                self.writer.log_text(step, f"rollout/{name}", text)

    def finish_rollouts(self) -> None:
        """Wait until the rollouts of all steps so far are on disk, or until their write has failed."""
        self._rollouts.wait()

    def close(self) -> None:
        """Wait for pending writes, then close the writers."""
        try:
            self.finish_rollouts()
        finally:
            self.writer.close()

    def record_alarms(self, step: int, alarms: dict[str, float], lines: Sequence[str]) -> None:
        """Record a step's metrics `alarm/NAME`, and print a line for each alarm that has started or ended."""
        self.writer.log(step, alarms)
        for line in lines:
            self.writer.print(line)

    def record_failed_save(self, step: int, line: str) -> None:
        """Record as `checkpoint/failed` that a checkpoint could not be written, and print the reason."""
        self.writer.log(step, {"checkpoint/failed": 1.0})
        self.writer.print(f"warning: {line}; the next scheduled save tries again")

    def record_evaluation(self, step: int, scores: dict[str, float], seconds: dict[str, float]) -> None:
        """Write the scores of one evaluation and the wall time of its stages. The scores are equal on all ranks."""
        self.writer.log(step, {f"evaluation/{name}": value for name, value in scores.items()} | seconds)
        self.writer.print(
            f"step {step}: held-out EM {scores['em']:.3f}, with the format gate "
            f"{scores['em_format_gated']:.3f}, on {scores['num_questions']:.0f} questions"
        )
