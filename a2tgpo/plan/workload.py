"""The expected work of a step, and its division over ranks, engines and micro-batches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import kv_bytes_per_token


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The mean trajectory; only a run can measure it, so its values are options of tools/plan.py."""

    prompt_tokens: float = 300.0
    response_tokens: float = 1700.0
    """Sampled and observation tokens together."""
    sampled_share: float = 0.4
    """Share of the response's tokens that the policy samples; the others are observations."""
    turns: float = 3.0
    """Tool calls."""
    tool_seconds: float = 0.3
    """Time of one tool call, seconds; hidden by other trajectories except at the end of the rollout."""
    longest_to_mean: float = 3.0
    """Sampled tokens of a step's longest trajectory relative to the mean, unless a limit is lower."""

    @property
    def tokens(self) -> float:
        """Length of the whole trajectory, which the trainer runs over."""
        return self.prompt_tokens + self.response_tokens

    @property
    def sampled_tokens(self) -> float:
        return self.response_tokens * self.sampled_share

    @property
    def output_share(self) -> float:
        """Share of the trajectory's tokens that need a log-prob: the sampled ones."""
        return self.sampled_tokens / self.tokens

    def limited(self, config: RunConfig) -> Workload:
        """Return this workload cut to the limits of `config`."""
        return dataclasses.replace(
            self,
            prompt_tokens=min(self.prompt_tokens, config.data.max_prompt_tokens),
            response_tokens=min(self.response_tokens, config.rollout.max_response_tokens),
            turns=min(self.turns, config.rollout.max_turns),
        )


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The division of a step."""

    data_parallel: int
    engines: int
    trajectories: int
    """Trajectories of the step, over all engines."""
    trajectories_per_engine: float
    """Mean; below 1 if there are more engines than trajectories."""
    tokens: float
    """Tokens of the step that the trainer runs over, without padding."""
    sampled_tokens: float
    optimizer_steps: int
    microbatches: int
    """Micro-batches per optimizer step and data-parallel replica, as full as packing allows."""
    microbatch_tokens: float
    """Mean tokens of a micro-batch."""
    rank_tokens: float
    """Mean tokens of a micro-batch on one context-parallel rank."""
    longest_sampled: float
    """Sampled tokens of the step's longest trajectory; with partial rollouts, only those sampled in this step."""
    in_flight: int
    """Trajectories that one engine starts at once, if the cache holds their first tokens."""
    concurrent: int
    """How many trajectories of mean length the cache holds to their end."""
    kv_tokens: int
    """Tokens that one engine's cache holds."""
    full_sequences: int
    """Sequences of full length that one engine's cache holds."""

    @property
    def displaced(self) -> float:
        """Trajectories per engine and step that find no room to grow; each is preempted once.

        In vLLM the number of preemptions is one to two times this number (docs/performance.md).
        """
        return self.trajectories_per_engine * (1 - self.concurrent / self.in_flight)


def geometry(
    config: RunConfig, dimensions: ModelDimensions, workload: Workload, *, gpus: int, kv_cache_bytes: float
) -> Geometry:
    """Return the division of a step of `workload` on `gpus` GPUs.

    Args:
        kv_cache_bytes: size of the cache on one rank.
    """
    data_parallel = gpus // config.parallel.model_ranks
    engines = gpus // config.rollout.tensor_parallel
    trajectories = config.rollout.prompts_per_step * config.rollout.group_size
    per_engine = trajectories / engines
    optimizer_steps = config.rollout.prompts_per_step // config.update.prompts_per_minibatch
    tokens_per_replica = trajectories * workload.tokens / optimizer_steps / data_parallel
    # A trajectory is never cut: even a smaller micro-batch limit admits a whole mean trajectory.
    microbatch_limit = max(config.update.max_microbatch_tokens, workload.tokens)
    microbatches = max(1, math.ceil(tokens_per_replica / microbatch_limit))
    kv_tokens = int(kv_cache_bytes / kv_bytes_per_token(config, dimensions))
    in_flight = min(config.rollout.max_concurrent, math.ceil(per_engine))
    most_sampled: float = min(
        config.rollout.max_response_tokens,
        config.rollout.max_turn_tokens * (config.rollout.max_turns + 1),
    )
    if config.rollout.partial.is_on:  # the turn in which the budget ends is played to its end
        turn_tokens = workload.sampled_tokens / (workload.turns + 1)
        most_sampled = min(most_sampled, config.rollout.partial.tokens_per_step + turn_tokens)
    return Geometry(
        data_parallel=data_parallel,
        engines=engines,
        trajectories=trajectories,
        trajectories_per_engine=per_engine,
        tokens=trajectories * workload.tokens,
        sampled_tokens=trajectories * workload.sampled_tokens,
        optimizer_steps=optimizer_steps,
        microbatches=microbatches,
        microbatch_tokens=tokens_per_replica / microbatches,
        rank_tokens=tokens_per_replica / microbatches / config.parallel.context,
        longest_sampled=min(most_sampled, workload.longest_to_mean * workload.sampled_tokens),
        in_flight=in_flight,
        concurrent=max(1, min(in_flight, int(kv_tokens / workload.tokens))),
        kv_tokens=kv_tokens,
        full_sequences=kv_tokens // config.max_model_len,
    )
