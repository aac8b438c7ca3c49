"""Compare the time model with published figures of other systems.

*Alike* runs work like this project: a dense model, packed sequences, Megatron, and engine and trainer on the same
GPUs in turn. The other runs show the limits of the model: engines whose kernels lose time on experts, and
micro-batches that are too small or too padded to fill a GPU.

Values that a source does not give are filled in; `filled_in` lists them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.model import ModelConfig, Recompute
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.plan.dimensions import KNOWN_MODELS, ModelDimensions
from a2tgpo.plan.hardware import GPUS
from a2tgpo.plan.plan import Plan, make_plan
from a2tgpo.plan.workload import Workload

ALIKE_ERROR_BOUND = 0.20
"""The largest |error| of an alike run, relative to the published seconds. A test enforces it."""

NEMO = "NeMo-RL performance summary"
NEMO_0_3 = "NeMo-RL 0.3 announcement; its stages, and tokens per sample, from issue 959 of NVIDIA-NeMo/RL"
SKYRL = "SkyRL Megatron page, Search-R1"


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    what: str
    source: str
    seconds: float
    """The published time."""
    stage: str
    """The prediction to compare: step | refit | rollout | score | update."""
    is_alike: bool
    filled_in: str
    gpu: str
    gpus: int
    dimensions: ModelDimensions
    config: RunConfig
    workload: Workload

    def plan(self) -> Plan:
        return make_plan(
            self.config,
            self.dimensions,
            GPUS[self.gpu],
            gpus=self.gpus,
            workload=self.workload,
        )

    @property
    def predicted_seconds(self) -> float:
        plan = self.plan()
        if self.stage == "step":
            return plan.step_seconds
        return plan.stage_seconds[self.stage]

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.predicted_seconds / self.seconds - 1


def _config(
    *,
    prompts: int,
    group: int,
    prompts_per_minibatch: int,
    max_response: int,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    engine_tensor: int = 1,
    recompute: Recompute = "none",
    microbatch_tokens: int = 16384,
    sequence: bool | None = None,
) -> RunConfig:
    return RunConfig(
        run=RunSettings(name="published"),
        model=ModelConfig(path="published", recompute=recompute),
        data=DataConfig(train="published", test="published", max_prompt_tokens=2048),
        search=SearchConfig(corpus="published"),
        parallel=ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            expert=expert,
            sequence=tensor > 1 if sequence is None else sequence,
        ),
        rollout=RolloutConfig(
            prompts_per_step=prompts,
            group_size=group,
            max_response_tokens=max_response,
            max_turn_tokens=max_response,
            tensor_parallel=engine_tensor,
            gpu_memory_fraction=0.6,
        ),
        update=UpdateConfig(
            prompts_per_minibatch=prompts_per_minibatch, max_microbatch_tokens=microbatch_tokens
        ),
        algorithm=AlgorithmConfig(kl_coef=1e-3),  # all of these runs also score by a reference
    )


def _single_turn(mean_tokens: float) -> Workload:
    """Return the workload of a mathematics question and its answer, which have `mean_tokens` tokens together."""
    return Workload(
        prompt_tokens=150,
        response_tokens=mean_tokens - 150,
        sampled_share=1.0,
        turns=0,
        longest_to_mean=math.inf,
    )


def _search_turns(mean_tokens: float) -> Workload:
    return Workload(prompt_tokens=mean_tokens / 4, response_tokens=mean_tokens * 3 / 4)


_NEMO_FILLED_IN = (
    "prompts of 150 tokens, micro-batches of 16,384, one trajectory reaches the limit, engines with 60 % of each of "
    "their cards"
)
_NEMO_RECOMPUTED = f"{_NEMO_FILLED_IN}, full recomputation"
_SKYRL_FILLED_IN = (
    "5 rollouts a prompt, full recomputation, policy and reference scored; micro-batches as full as ours"
)

PUBLISHED = (
    PublishedRun(
        what="Llama-3.1-8B, 16 H100",
        source=NEMO,
        seconds=92.8,
        stage="step",
        is_alike=True,
        filled_in=_NEMO_FILLED_IN,
        gpu="h100-80gb",
        gpus=16,
        dimensions=KNOWN_MODELS["llama-3.1-8b"],
        config=_config(prompts=64, group=32, prompts_per_minibatch=16, max_response=3946, pipeline=2),
        workload=_single_turn(1019),
    ),
    PublishedRun(
        what="Llama-3.1-70B, 32 H100",
        source=NEMO,
        seconds=106,
        stage="step",
        is_alike=True,
        filled_in=_NEMO_RECOMPUTED,
        gpu="h100-80gb",
        gpus=32,
        dimensions=KNOWN_MODELS["llama-3.1-70b"],
        config=_config(
            prompts=32,
            group=16,
            prompts_per_minibatch=32,
            max_response=3946,
            tensor=4,
            pipeline=8,
            engine_tensor=8,
            recompute="full",
        ),
        workload=_single_turn(675),
    ),
    PublishedRun(
        what="Qwen3-32B, 32 H100",
        source=NEMO,
        seconds=376,
        stage="step",
        is_alike=True,
        filled_in=_NEMO_RECOMPUTED,
        gpu="h100-80gb",
        gpus=32,
        dimensions=KNOWN_MODELS["qwen3-32b"],
        config=_config(
            prompts=64,
            group=32,
            prompts_per_minibatch=16,
            max_response=3946,
            tensor=4,
            pipeline=4,
            engine_tensor=4,
            recompute="full",
        ),
        workload=_single_turn(3251),
    ),
    PublishedRun(
        what="Llama-3.1-8B, 8 GB200",
        source=NEMO,
        seconds=91.0,
        stage="step",
        is_alike=True,
        filled_in=_NEMO_FILLED_IN,
        gpu="gb200-186gb",
        gpus=8,
        dimensions=KNOWN_MODELS["llama-3.1-8b"],
        config=_config(prompts=64, group=32, prompts_per_minibatch=16, max_response=3946),
        workload=_single_turn(1066),
    ),
    PublishedRun(
        what="Qwen3-32B, 16 GB200",
        source=NEMO,
        seconds=381,
        stage="step",
        is_alike=True,
        filled_in=_NEMO_RECOMPUTED,
        gpu="gb200-186gb",
        gpus=16,
        dimensions=KNOWN_MODELS["qwen3-32b"],
        config=_config(
            prompts=64, group=32, prompts_per_minibatch=16, max_response=3946, tensor=2, recompute="full"
        ),
        workload=_single_turn(3253),
    ),
    PublishedRun(
        what="Qwen3-30B-A3B, 32 H100",
        source=NEMO,
        seconds=192,
        stage="step",
        is_alike=False,
        filled_in=_NEMO_RECOMPUTED,
        gpu="h100-80gb",
        gpus=32,
        dimensions=KNOWN_MODELS["qwen3-30b-a3b"],
        config=_config(
            prompts=64,
            group=32,
            prompts_per_minibatch=16,
            max_response=3946,
            expert=8,
            engine_tensor=2,
            recompute="full",
        ),
        workload=_single_turn(3306),  # 1,102 tokens/s/GPU over 192 s, of 2,048 trajectories
    ),
    PublishedRun(
        what="Qwen3-30B-A3B, 16 GB200",
        source=NEMO,
        seconds=221,
        stage="step",
        is_alike=False,
        filled_in=_NEMO_FILLED_IN,
        gpu="gb200-186gb",
        gpus=16,
        dimensions=KNOWN_MODELS["qwen3-30b-a3b"],
        config=_config(prompts=64, group=32, prompts_per_minibatch=16, max_response=3946, expert=16),
        workload=_single_turn(3298),
    ),
    *(
        PublishedRun(
            what=f"{title}, {what}",
            source=SKYRL,
            seconds=seconds,
            stage=stage,
            is_alike=False,
            filled_in=_SKYRL_FILLED_IN,
            gpu="h100-80gb",
            gpus=8,
            dimensions=KNOWN_MODELS[name],
            config=_config(
                prompts=512, group=5, prompts_per_minibatch=256, max_response=2048, recompute="full"
            ),
            workload=_search_turns(mean_tokens),
        )
        for title, name, mean_tokens, what, stage, seconds in (
            ("Qwen2.5-3B, 8 H100", "qwen2.5-3b", 658, "training", "update", 48),
            ("Qwen2.5-3B, 8 H100", "qwen2.5-3b", 658, "forward passes", "score", 39),
            ("Qwen2.5-7B, 8 H100", "qwen2.5-7b", 819, "training", "update", 93),
            ("Qwen2.5-7B, 8 H100", "qwen2.5-7b", 819, "forward passes", "score", 46),
        )
    ),
)

UNSEEN = tuple(
    PublishedRun(
        what=what,
        source=NEMO_0_3,
        seconds=seconds,
        stage=stage,
        is_alike=True,
        filled_in="prompts of 150 tokens, one trajectory reaches the limit; layout and batches are the release's",
        gpu="h100-80gb",
        gpus=gpus,
        dimensions=KNOWN_MODELS[name],
        config=config,
        workload=_single_turn(150 + sampled),
    )
    for what, name, gpus, sampled, config, stages in (
        (
            "Llama-3.1-8B, 8 H100",
            "llama-3.1-8b",
            8,
            795,
            _config(
                prompts=64,
                group=32,
                prompts_per_minibatch=16,
                max_response=3946,
                pipeline=2,
                microbatch_tokens=4096,
            ),
            {"step": 112, "refit": 5, "rollout": 58, "score": 18, "update": 28},
        ),
        (
            "Llama-3.1-70B, 64 H100",
            "llama-3.1-70b",
            64,
            398,
            _config(
                prompts=64,
                group=32,
                prompts_per_minibatch=16,
                max_response=3946,
                tensor=4,
                pipeline=4,
                engine_tensor=4,
                microbatch_tokens=4096,
                sequence=False,
            ),
            {"step": 147, "refit": 14, "rollout": 84, "score": 18, "update": 28},
        ),
    )
    for stage, seconds in stages.items()
)
"""Stages of runs that were not used to choose the assumptions."""
