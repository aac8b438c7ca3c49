"""Multi-turn generation, its engine, and information gain."""

from dataclasses import dataclass, field
from typing import Literal

from a2tgpo.io.errors import require

GPU_STEP_TOKENS = 8192
"""Most tokens that an engine on a GPU runs in one step, prefill and decoding together. vLLM uses as many or more for
offline generation, but 2,048 by default (vllm/engine/arg_utils.py, get_batch_defaults)."""


@dataclass(frozen=True, kw_only=True)
class GainConfig:
    """Information gain (Eq. 2-3)."""

    measure: Literal["probability", "log_probability"] = "probability"
    """Difference of probabilities (Eq. 3), or of mean log-probs as in the authors' released code."""
    answer_reduction: Literal["first", "max"] = "first"
    """Score the first gold answer, or the most probable alias at every turn (max)."""
    max_aliases: int = 8
    """Aliases to score with answer_reduction=max; an alias too long to score in every context is left out."""
    scaffold: str = "</think> <answer> \\boxed{"
    """Text between a context and the gold answer, as the policy itself would open an answer. An initial </think> is
    dropped where no thought is open, an initial <think> where one is."""
    verify_every: int = 0
    """Steps between checks of the engine's scores by the trainer (`gain/engine_trainer_gap`); 0: never. A check takes
    less memory than an update (docs/performance.md)."""
    verify_trajectories: int = 4
    """Trajectories of each data-parallel replica that a check scores."""

    def __post_init__(self) -> None:
        for name in ("max_aliases", "verify_trajectories"):
            require(getattr(self, name) >= 1, f"rollout.gain.{name}", getattr(self, name), ">= 1")
        require(
            self.scaffold not in ("", "<think>", "</think>"),
            "rollout.gain.scaffold",
            self.scaffold,
            "a text other than <think> or </think>",
        )
        require(self.verify_every >= 0, "rollout.gain.verify_every", self.verify_every, ">= 0")


@dataclass(frozen=True, kw_only=True)
class PartialConfig:
    """Steps that do not wait for their longest trajectories; the next step continues these (docs/performance.md).

    Needs `algorithm.correction`, because the tokens of one trajectory then come from several policies.
    """

    tokens_per_step: int = 0
    """Sampled tokens after which a trajectory begins no further turn in this step; 0: every trajectory ends in its
    step."""
    extra_prompts: int = 0
    """Extra prompts kept in flight over all ranks, the upper bound of carried-over groups; at most
    prompts_per_step."""
    max_staleness: int = 1
    """Most steps between a trajectory's oldest turn and the step that trains on it."""

    def __post_init__(self) -> None:
        require(self.tokens_per_step >= 0, "rollout.partial.tokens_per_step", self.tokens_per_step, ">= 0")
        require(
            self.extra_prompts == 0 if not self.is_on else self.extra_prompts >= 0,
            "rollout.partial.extra_prompts",
            self.extra_prompts,
            ">= 0, and 0 while rollout.partial.tokens_per_step is 0",
        )
        require(self.max_staleness >= 1, "rollout.partial.max_staleness", self.max_staleness, ">= 1")

    @property
    def is_on(self) -> bool:
        return self.tokens_per_step > 0

    def check_questions(self, num_questions: int, *, prompts_per_step: int) -> None:
        """Raise `ConfigError` if a set is so small that a question could be drawn again while it is in flight."""
        # The sampler checks only at an epoch's start which questions are in flight, and then moves them to its end.
        needed = self.extra_prompts + (self.max_staleness + 1) * prompts_per_step
        require(
            self.extra_prompts == 0 or needed <= num_questions,
            "rollout.partial.extra_prompts",
            self.extra_prompts,
            f"0, or extra_prompts + (max_staleness + 1) * rollout.prompts_per_step ({needed}) at most the number of "
            f"questions in data.train ({num_questions})",
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """One step's trajectories."""

    prompts_per_step: int = 64
    """Prompts per step over all ranks; must be a multiple of the number of engines (paper: 64)."""
    group_size: int = 16
    """Trajectories per prompt, G (paper: 16)."""
    dynamic_sampling: bool = False
    """DAPO: drop groups whose outcome rewards are all equal, and draw other prompts until the step is full."""
    max_draws: int = 10
    """Most draws of prompts in a step with dynamic_sampling; dropped groups then fill the rest."""
    temperature: float = 1.0
    """Sampling temperature T (paper: 1.0). Ratios, KL, entropy and likelihood use the sampling distribution
    softmax(logits / T); information gain uses temperature 1."""
    top_p: float = 1.0
    """Nucleus sampling threshold, only for evaluation with samples; training needs 1.0 (paper: 1.0)."""
    max_turns: int = 6
    """Most tool calls of a trajectory (paper: 6); one more call ends it."""
    max_turn_tokens: int = 1024
    """Longest single generation, tokens."""
    max_response_tokens: int = 6192
    """Sampled and observation tokens of one trajectory together (paper: 6192)."""
    tensor_parallel: int = 1
    """Ranks that share one engine."""
    check_lockstep_every: int = 1
    """Engine passes between comparisons of what the ranks of one engine have scheduled, sampled and freed; 0: never.
    With 1, a difference ends the run with one line before it does harm; with more, it may break a pass first."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the engine's weights; auto: the model's."""
    quantization: Literal["none", "fp8", "fp8_per_channel"] = "none"
    """Quantise linear layers to e4m3 whenever weights are loaded, only on GPUs. One scale covers 128x128 weights or
    128 activations (fp8), or a row of weights or a token (fp8_per_channel)."""
    max_concurrent: int = 256
    """Trajectories that one engine decodes at a time."""
    kv_cache_gib: float = 0.0
    """Memory for the KV cache on each rank of the engine, GiB. 0, only on GPUs: chosen with `gpu_memory_fraction`, or
    the rest of a fraction that is set, as vLLM measures it at the start."""
    gpu_memory_fraction: float = 0.0
    """The engine's share of the GPU, which must be free when the engine starts. 0: the plan chooses a share that
    leaves a tenth of the GPU free in the rollout; `tools/plan.py` and a dry run print it."""
    block_size: int = 0
    """Tokens in one KV block; 0: 32 on CPUs, 16 on GPUs."""
    enforce_eager: bool = False
    """Skip graph capture and compilation; always on without a GPU."""
    async_scheduling: bool = False
    """Let vLLM schedule the next engine step while the GPU computes this one. Off until measured on a GPU:
    `tools/gpu_check.py --checks engine_speed` compares tokens and speed."""
    gain: GainConfig = field(default_factory=GainConfig)
    partial: PartialConfig = field(default_factory=PartialConfig)

    def __post_init__(self) -> None:
        for name in (
            "prompts_per_step",
            "group_size",
            "max_turns",
            "max_turn_tokens",
            "max_response_tokens",
            "tensor_parallel",
            "max_concurrent",
            "max_draws",
        ):
            require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), ">= 1")
        for name in ("check_lockstep_every", "kv_cache_gib"):
            require(getattr(self, name) >= 0, f"rollout.{name}", getattr(self, name), ">= 0")
        require(
            self.group_size > 1 or not self.dynamic_sampling,
            "rollout.group_size",
            self.group_size,
            ">= 2 with rollout.dynamic_sampling",
        )
        require(
            not (self.partial.is_on and self.dynamic_sampling),
            "rollout.dynamic_sampling",
            self.dynamic_sampling,
            "false with rollout.partial.tokens_per_step > 0",
        )
        require(
            self.partial.extra_prompts <= self.prompts_per_step,
            "rollout.partial.extra_prompts",
            self.partial.extra_prompts,
            f"at most rollout.prompts_per_step ({self.prompts_per_step}), since one step must be able to take "
            "all carried-over groups",
        )
        # vLLM raises lower temperatures to 0.01.
        require(0.01 <= self.temperature <= 2, "rollout.temperature", self.temperature, "in [0.01, 2]")
        require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "in (0, 1]")
        require(
            self.quantization == "none" or self.dtype != "float32",
            "rollout.quantization",
            self.quantization,
            "none with rollout.dtype float32",
        )
        require(
            0 <= self.gpu_memory_fraction <= 0.95,
            "rollout.gpu_memory_fraction",
            self.gpu_memory_fraction,
            "in (0, 0.95], or 0: chosen by the plan",
        )

    def check_training(self) -> None:
        """Raise `ConfigError` if trajectories could be played but not trained on."""
        # The engine gives tokens outside the nucleus probability 0, but the trainer does not: a biased gradient.
        require(
            self.top_p == 1,
            "rollout.top_p",
            self.top_p,
            "1.0 for training, since the trainer's log-probs are those of the whole distribution; "
            "below 1 in tools/evaluate.py and tools/chat.py",
        )
