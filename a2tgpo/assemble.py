"""Build all parts of a run from its configuration. Cheap parts and checks come first, so that errors appear early."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from a2tgpo.checkpoint.folder import read_record
from a2tgpo.collect.state import RolloutState
from a2tgpo.config.run import RunConfig
from a2tgpo.data.question_mix import load_question_mix
from a2tgpo.data.question_set import Question
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.data.template import PromptSet, PromptTemplate, contrast_prompt_set
from a2tgpo.data.tokenizer import load_tokenizer
from a2tgpo.environment.tool import Toolset, build_tools
from a2tgpo.evaluate.sets import EvaluationSets, load_evaluation_sets
from a2tgpo.io.errors import ConfigError, first_line
from a2tgpo.loss.credit import needs_contrast
from a2tgpo.loss.entropy import EntropyWeight
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.metrics.guards import Guards
from a2tgpo.metrics.timers import StageTimers
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.logprobs import TokenDistribution
from a2tgpo.model.rope import check_positions
from a2tgpo.parallel.collectives import all_gather_object, world_group
from a2tgpo.parallel.engine_group import EngineGroup, build_engine_group
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.protocol.build import build_protocol
from a2tgpo.protocol.protocol import AgentProtocol
from a2tgpo.reward.episode import reader_of
from a2tgpo.reward.load import build_rewards, need_answers
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.rollout.engine_limits import check_router_replay
from a2tgpo.rollout.engine_share import settle_engine_share
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.rollout.vllm_engine import VllmEngine
from a2tgpo.rollout.vllm_environment import name_engine_ranges
from a2tgpo.run.checkpoints import RunCheckpoints
from a2tgpo.run.date import run_date
from a2tgpo.run.folder import RunFolder
from a2tgpo.run.resume import require_same_run
from a2tgpo.update.context_scores import ContextScorer
from a2tgpo.update.extrapolation import Extrapolation
from a2tgpo.update.optimizer import LearningRateSchedule, build_optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """The objects that one rank keeps for the whole run."""

    config: RunConfig
    groups: ParallelGroups
    engine_group: EngineGroup
    tokenizer: PreTrainedTokenizerBase
    train_prompts: PromptSet
    contrast_prompts: PromptSet | None
    """Contrast prompts of the training questions, or None if no token credit needs them."""
    test_sets: EvaluationSets
    state: RolloutState
    policy: Policy
    reference: Policy | None
    """The initial policy: a frozen copy or, with adapters, `policy.base`. None if the run needs no reference."""
    optimizer: Any
    schedule: LearningRateSchedule
    entropy_weight: EntropyWeight
    extrapolation: Extrapolation
    phases: MemoryPhases
    """Moves policy, optimizer, reference and engine to the GPU and away from it."""
    engine: VllmEngine
    toolset: Toolset
    rollout: GroupRollout
    reward: TrajectoryReward
    reward_pool: RewardPool
    """Runs the rewards."""
    startup: dict[str, float]
    """Maps `time/startup_STAGE_s` to the seconds that this process took for each stage of the build."""

    @property
    def distribution(self) -> TokenDistribution:
        """The distribution from which the rollouts sample tokens."""
        temperature = self.config.rollout.temperature
        return TokenDistribution(temperature=temperature, num_ids=self.engine.num_token_ids)

    def close(self) -> None:
        """Stop the tools, the rewards and the engine. The process group is not destroyed."""
        self.rollout.close()
        self.reward_pool.close()
        self.toolset.close()
        self.engine.close()


def assemble(config: RunConfig, groups: ParallelGroups, *, resume_from: Path | None = None) -> RunParts:
    """Build all parts of a run; every rank must call this.

    Args:
        resume_from: the checkpoint that the caller loads next. With a checkpoint, policy and engine read no weights
            from `model.path`.

    Raises:
        ConfigError: with a one-line message, if a run with this configuration is impossible, or if `resume_from` is a
            checkpoint of another run.
    """
    config.check_training()
    rewards = build_rewards(config)
    with_answers = need_answers(config, rewards)
    timers = StageTimers()
    engine_group = build_engine_group(config, groups)
    with timers.stage("startup_data"):
        hf_config = load_hf_config(config.model.path)
        check_positions(config.model.path, hf_config, config.max_model_len)
        if config.rollout.router_replay:
            check_router_replay(hf_config)
        mix = load_question_mix(config.data.train_files, need_answers=with_answers)
        test_questions = load_evaluation_sets(config, need_answers=with_answers)
    with timers.stage("startup_tools"):
        toolset = build_tools(config)
    with timers.stage("startup_data"):
        protocol = build_run_protocol(config, groups, toolset)
        train_prompts = _prompt_set(mix.questions, protocol.template, config, groups)
        contrast_prompts = build_contrast_prompts(mix.questions, protocol.template, config, groups)
        test_sets = EvaluationSets(
            {
                name: _prompt_set(questions, protocol.template, config, groups)
                for name, questions in test_questions.items()
            }
        )
        sampler = PromptSampler(
            mix.sizes,
            config.rollout.prompts_per_step,
            config.run.seed,
            weights=mix.weights,
            fingerprint=train_prompts.fingerprint,
        )
        if resume_from is not None:
            require_same_run(resume_from, _record_of(resume_from), hf_config, sampler)
        config.rollout.check_questions(len(train_prompts))
    with timers.stage("startup_model"):
        policy = build_policy(
            config.model,
            config.parallel,
            groups,
            update=config.update,
            with_weights=resume_from is None,
            router_replay=config.rollout.router_replay,
        )
        reference = build_reference(config, groups, policy)
        minibatches = config.rollout.prompts_per_step // config.update.prompts_per_minibatch
        optimizer, schedule = build_optimizer(
            policy, config.update, total_steps=config.run.steps * minibatches
        )
        phases = MemoryPhases(policy, optimizer=optimizer, reference=reference, offload=config.update.offload)
    with timers.stage("startup_engine"):
        engine = phases.build_engine(
            functools.partial(
                build_engine,
                config,
                engine_group,
                tokenizer=protocol.tokenizer,
                with_weights=resume_from is None,
            )
        )
    return RunParts(
        config=config,
        groups=groups,
        engine_group=engine_group,
        tokenizer=protocol.tokenizer,
        train_prompts=train_prompts,
        contrast_prompts=contrast_prompts,
        test_sets=test_sets,
        state=RolloutState(sampler=sampler),
        policy=policy,
        reference=reference,
        optimizer=optimizer,
        schedule=schedule,
        entropy_weight=EntropyWeight(config.algorithm),
        extrapolation=Extrapolation(config.update.extrapolation),
        phases=phases,
        engine=engine,
        toolset=toolset,
        rollout=build_rollout(config, engine_group, engine=engine, toolset=toolset, protocol=protocol),
        reward=build_reward(config, protocol),
        reward_pool=RewardPool(rewards, config.reward),
        startup=timers.take(),
    )


def build_run_protocol(config: RunConfig, groups: ParallelGroups, toolset: Toolset) -> AgentProtocol:
    """Build the protocol of a run, with the tokenizer of `model.path`; every rank must call this."""
    tokenizer = load_tokenizer(config.model.path)
    protocol = build_protocol(config, tokenizer, schemas=toolset.schemas, date=run_date(config, groups))
    if groups.rank == 0 and (warning := protocol.warning):
        logger.warning("warning: %s", warning)
    return protocol


def build_reference(config: RunConfig, groups: ParallelGroups, policy: Policy) -> Policy | None:
    """Build the frozen initial policy, or return None if the run needs no reference. Every rank must call this.

    If `policy` has adapters, the reference is `policy` without them.
    """
    if not config.needs_reference:
        return None
    if policy.adapters is not None:
        return policy.base
    return build_policy(config.model, config.parallel, groups, update=None, trainable=False)


def build_engine(
    config: RunConfig,
    engine_group: EngineGroup,
    *,
    tokenizer: PreTrainedTokenizerBase,
    with_weights: bool = True,
) -> VllmEngine:
    """Build an awake engine with the weights of `model.path`; every rank must call this.

    If `with_weights` is false, the caller must load weights before it uses the engine.
    """
    config = settle_engine_share(config)
    if config.profile.steps:
        name_engine_ranges(config.profile.tool)
    return VllmEngine(
        config.model.path,
        config=config.rollout,
        model_dtype=config.model.dtype,
        max_model_len=config.max_model_len,
        seed=config.run.seed,
        replica_group=engine_group.group,
        with_weights=with_weights,
        tokenizer=tokenizer,
    )


def build_rollout(
    config: RunConfig,
    engine_group: EngineGroup,
    *,
    engine: VllmEngine,
    toolset: Toolset,
    protocol: AgentProtocol,
) -> GroupRollout:
    """Build the object that plays rollouts on this rank's engine."""
    return GroupRollout(engine, toolset, protocol, rollout=config.rollout, engine_group=engine_group)


def build_reward(config: RunConfig, protocol: AgentProtocol) -> TrajectoryReward:
    """Build the object that sets the rewards of trajectories that were played with `protocol`."""
    return TrajectoryReward(
        reader=reader_of(protocol),
        measure=config.rollout.gain.measure,
        config=config.reward,
        max_response_tokens=config.rollout.max_response_tokens,
    )


def _record_of(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {first_line(error)}") from error


def build_contrast_prompts(
    questions: list[Question], template: PromptTemplate, config: RunConfig, groups: ParallelGroups
) -> PromptSet | None:
    """Build the contrast prompts of `questions`, or return None if no token credit needs them.

    Every rank must call this.

    Raises:
        ConfigError: on all ranks, if a contrast prompt is too long.
    """
    if not needs_contrast(config.algorithm):
        return None
    return _checked(contrast_prompt_set(questions, template, config), groups)


def _prompt_set(
    questions: list[Question], template: PromptTemplate, config: RunConfig, groups: ParallelGroups
) -> PromptSet:
    """Build the prompt set of `questions`. If a prompt is too long, raise ConfigError on all ranks."""
    limit = config.data.max_prompt_tokens
    return _checked(PromptSet(questions, template, max_prompt_tokens=limit), groups)


def _checked(prompts: PromptSet, groups: ParallelGroups) -> PromptSet:
    """Return `prompts`. If a prompt is too long, raise ConfigError on all ranks."""
    share = slice(groups.rank, None, groups.world_size)
    faults = [fault for fault in all_gather_object(prompts.first_too_long(share), world_group()) if fault]
    if faults:
        raise ConfigError(min(faults)[1])
    return prompts


def build_context_scorer(parts: RunParts) -> ContextScorer:
    """Build the object with which the trainer scores the gold answers of the training questions."""
    config = parts.config
    return ContextScorer(
        answer_tokens=parts.rollout.answer_tokens,
        answers={question.id: question.answers for question in parts.train_prompts.questions},
        max_model_len=config.max_model_len,
        max_tokens=config.update.max_microbatch_tokens,
    )


def build_checkpoints(parts: RunParts, folder: RunFolder, guards: Guards) -> RunCheckpoints:
    return RunCheckpoints(
        folder,
        parts.config,
        parts.groups,
        parts.engine_group,
        policy=parts.policy,
        optimizer=parts.optimizer,
        schedule=parts.schedule,
        entropy_weight=parts.entropy_weight,
        extrapolation_gate=parts.extrapolation.gate,
        state=parts.state,
        guards=guards,
        phases=parts.phases,
        train_prompts=parts.train_prompts,
        test_sets=parts.test_sets,
    )
