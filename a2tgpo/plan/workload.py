"""Describe the expected work of a step, and divide it over ranks, engines and micro-batches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import kv_bytes_per_token

BRANCH_SHARE = 0.5
"""Share of a branch's turns that the branch plays itself, if it branches off from its parent at a random turn (arXiv
2509.21240, Eq. 4)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The mean trajectory. Its values are options of tools/plan.py, because only a run can measure them."""

    prompt_tokens: float = 300.0
    response_tokens: float = 1700.0
    """Tokens of the response: sampled tokens and observation tokens together."""
    sampled_share: float = 0.4
    """Share of the response's tokens that the policy samples. The other tokens are observations."""
    turns: float = 3.0
    """Number of tool calls."""
    tool_seconds: float = 0.3
    """Seconds of one tool call. During the call the engine plays other trajectories, except at the end of the
    rollout.
    """
    longest_to_mean: float = 3.0
    """Sampled tokens of a step's longest trajectory, divided by the mean. A limit on lengths may still
    cut this trajectory."""

    @property
    def tokens(self) -> float:
        return self.prompt_tokens + self.response_tokens

    @property
    def sampled_tokens(self) -> float:
        return self.response_tokens * self.sampled_share

    @property
    def output_share(self) -> float:
        """Share of the trajectory's tokens that are sampled and therefore need a log-prob."""
        return self.sampled_tokens / self.tokens

    def limited(self, config: RunConfig) -> Workload:
        """Return this workload, with values above the limits of `config` reduced to these limits."""
        return dataclasses.replace(
            self,
            prompt_tokens=min(self.prompt_tokens, config.data.max_prompt_tokens),
            response_tokens=min(self.response_tokens, config.rollout.max_response_tokens),
            turns=min(self.turns, config.rollout.max_turns),
        )


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The division of a step over ranks, engines and micro-batches."""

    data_parallel: int
    engines: int
    trajectories: int
    """Number of trajectories of the step, over all engines."""
    trajectories_per_engine: float
    """Mean number of trajectories of one engine; below 1 if there are more engines than trajectories."""
    tokens: float
    """Number of tokens that the trainer computes in the step, without padding."""
    sampled_tokens: float
    played_share: float
    """Number of turns that the rollout plays, divided by the number of turns of the step's trajectories. Below 1 with
    trees, whose branches share turns. Above 1 with inner branches, which are not among the step's trajectories."""
    optimizer_steps: int
    microbatches: int
    """Micro-batches per optimizer step and data-parallel replica, if each is packed as full as possible."""
    microbatch_tokens: float
    """Mean number of tokens of a micro-batch."""
    rank_tokens: float
    """Mean number of a micro-batch's tokens on one context-parallel rank."""
    longest_sampled: float
    """Sampled tokens of the longest trajectory; with partial rollouts, only its tokens of this step."""
    in_flight: int
    """Number of trajectories that one engine starts at once, if the cache has room for their first tokens."""
    concurrent: int
    """Number of trajectories of mean length that the cache has room for at their full length."""
    kv_tokens: int
    """Number of tokens that one engine's cache can hold."""
    full_sequences: int
    """Number of sequences of full length that one engine's cache can hold."""

    @property
    def displaced(self) -> float:
        """Number of trajectories per engine and step that find no room to grow in the cache.

        vLLM's number of preemptions is one to two times this number (docs/performance.md).
        """
        return self.trajectories_per_engine * (1 - self.concurrent / self.in_flight)


def geometry(
    config: RunConfig, dimensions: ModelDimensions, workload: Workload, *, gpus: int, kv_cache_bytes: float
) -> Geometry:
    """Return how a step of `workload` is divided on a cluster of `gpus` GPUs.

    Args:
        kv_cache_bytes: size of an engine's KV cache on one rank.
    """
    data_parallel = gpus // config.parallel.model_ranks
    engines = gpus // config.rollout.tensor_parallel
    trajectories = config.rollout.prompts_per_step * config.rollout.group_size
    per_engine = trajectories / engines
    optimizer_steps = config.rollout.prompts_per_step // config.update.prompts_per_minibatch
    tokens_per_replica = trajectories * workload.tokens / optimizer_steps / data_parallel
    # A micro-batch holds whole trajectories, so the limit is at least the mean length of a trajectory.
    microbatch_limit = max(config.update.max_microbatch_tokens, workload.tokens)
    microbatches = max(1, math.ceil(tokens_per_replica / microbatch_limit))
    kv_tokens = int(kv_cache_bytes / kv_bytes_per_token(config, dimensions))
    in_flight = min(config.rollout.max_concurrent, math.ceil(per_engine))
    most_sampled: float = min(
        config.rollout.max_response_tokens,
        config.rollout.max_turn_tokens * (config.rollout.max_turns + 1),
    )
    if config.rollout.partial.is_on:  # a turn that begins within the budget is played to its end
        turn_tokens = workload.sampled_tokens / (workload.turns + 1)
        most_sampled = min(most_sampled, config.rollout.partial.tokens_per_step + turn_tokens)
    tree, played_share, rounds = config.rollout.tree, 1.0, 0
    if tree.is_on:
        played_share -= (1 - BRANCH_SHARE) * (1 - tree.initial / config.rollout.group_size)
        rounds = tree.rounds  # the rounds of a prompt play one after another
    if config.rollout.inner_branches:
        played_share += BRANCH_SHARE * config.rollout.inner_branches / config.rollout.group_size
        rounds = 1
    longest_sampled = min(most_sampled, workload.longest_to_mean * workload.sampled_tokens)
    return Geometry(
        data_parallel=data_parallel,
        engines=engines,
        trajectories=trajectories,
        trajectories_per_engine=per_engine,
        tokens=trajectories * workload.tokens,
        sampled_tokens=trajectories * workload.sampled_tokens * played_share,
        played_share=played_share,
        optimizer_steps=optimizer_steps,
        microbatches=microbatches,
        microbatch_tokens=tokens_per_replica / microbatches,
        rank_tokens=tokens_per_replica / microbatches / config.parallel.context,
        longest_sampled=longest_sampled * (1 + BRANCH_SHARE * rounds),
        in_flight=in_flight,
        concurrent=max(1, min(in_flight, int(kv_tokens / workload.tokens))),
        kv_tokens=kv_tokens,
        full_sequences=kv_tokens // config.max_model_len,
    )
