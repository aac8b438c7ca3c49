"""What a step is expected to bring, and how it is dealt over ranks, engines and micro-batches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import kv_bytes_per_token


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The mean trajectory; only a run can tell, so these are options of the tool."""

    prompt_tokens: float = 300.0
    response_tokens: float = 1700.0
    """Sampled and observation tokens together."""
    sampled_share: float = 0.4
    """Of the response's tokens, sampled by the policy; the others are observations."""
    turns: float = 3.0
    """Tool calls."""
    tool_seconds: float = 0.3
    """One tool call, seconds; hidden behind other trajectories except at the end of the rollout."""
    longest_to_mean: float = 3.0
    """Sampled tokens of a step's longest trajectory against the mean, unless a limit is reached first."""

    @property
    def tokens(self) -> float:
        """The whole trajectory, which is what the trainer runs over."""
        return self.prompt_tokens + self.response_tokens

    @property
    def sampled_tokens(self) -> float:
        return self.response_tokens * self.sampled_share

    @property
    def output_share(self) -> float:
        """Of the trajectory's tokens, those whose log-prob the trainer asks for: the sampled ones."""
        return self.sampled_tokens / self.tokens

    def limited(self, config: RunConfig) -> Workload:
        """The same within the limits of `config`."""
        return dataclasses.replace(
            self,
            prompt_tokens=min(self.prompt_tokens, config.data.max_prompt_tokens),
            response_tokens=min(self.response_tokens, config.rollout.max_response_tokens),
            turns=min(self.turns, config.rollout.max_turns),
        )


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a step is divided."""

    data_parallel: int
    engines: int
    trajectories: int
    """Of the step, over all engines."""
    trajectories_per_engine: float
    """Mean; below 1 where there are more engines than trajectories."""
    tokens: float
    """Of the step, that the trainer runs over; padding not counted."""
    sampled_tokens: float
    optimizer_steps: int
    microbatches: int
    """Per optimizer step and data-parallel replica, with micro-batches as full as packing leaves them."""
    microbatch_tokens: float
    """Mean filling of a micro-batch."""
    rank_tokens: float
    """Of these, what one context-parallel rank runs."""
    longest_sampled: float
    """Sampled tokens of the step's longest trajectory; of them those of one step, where partial rollouts carry on."""
    in_flight: int
    """Trajectories that one engine begins at once, if there is room for what they begin with."""
    concurrent: int
    """Of these, trajectories of mean length that its cache holds to their end: decoded at once."""
    kv_tokens: int
    """Tokens that one engine's cache holds."""
    full_sequences: int
    """Sequences of full length that it holds."""

    @property
    def displaced(self) -> float:
        """Trajectories of an engine and step that find no room to grow: each is preempted once.

        vLLM preempts between one and two times as many (docs/performance.md).
        """
        return self.trajectories_per_engine * (1 - self.concurrent / self.in_flight)


def geometry(
    config: RunConfig, dimensions: ModelDimensions, workload: Workload, *, gpus: int, kv_cache_bytes: float
) -> Geometry:
    """How a step of `workload` is divided on `gpus` cards.

    Args:
        kv_cache_bytes: of one rank.
    """
    data_parallel = gpus // config.parallel.model_ranks
    engines = gpus // config.rollout.tensor_parallel
    trajectories = config.rollout.prompts_per_step * config.rollout.group_size
    per_engine = trajectories / engines
    optimizer_steps = config.rollout.prompts_per_step // config.update.prompts_per_minibatch
    tokens_per_replica = trajectories * workload.tokens / optimizer_steps / data_parallel
    # A trajectory is never cut: a micro-batch shorter than the mean trajectory still takes a whole one.
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
