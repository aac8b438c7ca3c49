"""Multi-turn generation, the engine, and the measurement of information gain."""

from dataclasses import dataclass, field

from a2tgpo.io.errors import require

GPU_STEP_TOKENS = 8192
"""Most tokens that an engine on a GPU runs in one step, prefill and decoding together. vLLM's own default for offline
generation is at least this; its general default is 2,048 (vllm/engine/arg_utils.py, get_batch_defaults).
"""


@dataclass(frozen=True, kw_only=True)
class GainConfig:
    """Information gain (Eq. 2-3)."""

    measure: str = "probability"
    """probability (Eq. 3) | log_probability (mean log-prob difference, as in the authors' released code)."""
    answer_reduction: str = "first"
    """first (score the first gold answer) | max (the most probable alias, at every turn)."""
    max_aliases: int = 8
    """Aliases scored when answer_reduction is max; those too long to be scored in every context are left out."""
    scaffold: str = "</think> <answer> \\boxed{"
    """Text between a context and the gold answer: what the policy itself would write to open an answer. A </think> at
    its begin is left out where no thought is open, a <think> where one is."""
    verify_every: int = 0
    """Steps between checks of the engine's scores by the trainer (`gain/engine_trainer_gap`); 0: never. A check takes
    less memory than an update (docs/performance.md)."""
    verify_trajectories: int = 4
    """Trajectories of each data-parallel replica that such a check scores."""

    def __post_init__(self) -> None:
        require(
            self.measure in ("probability", "log_probability"),
            "rollout.gain.measure",
            self.measure,
            "probability | log_probability",
        )
        require(
            self.answer_reduction in ("first", "max"),
            "rollout.gain.answer_reduction",
            self.answer_reduction,
            "first | max",
        )
        require(self.max_aliases >= 1, "rollout.gain.max_aliases", self.max_aliases, ">= 1")
        require(
            self.scaffold not in ("", "<think>", "</think>"),
            "rollout.gain.scaffold",
            self.scaffold,
            "a text besides <think> or </think>",
        )
        require(self.verify_every >= 0, "rollout.gain.verify_every", self.verify_every, ">= 0")
        require(
            self.verify_trajectories >= 1,
            "rollout.gain.verify_trajectories",
            self.verify_trajectories,
            ">= 1",
        )


@dataclass(frozen=True, kw_only=True)
class PartialConfig:
    """Steps that do not wait for their longest trajectories, which go on in the next one (docs/performance.md).

    Needs `algorithm.correction`: tokens of one trajectory then come from several policies.
    """

    tokens_per_step: int = 0
    """Sampled tokens after which a trajectory begins no further turn in this step; 0: every rollout ends within its
    step."""
    extra_prompts: int = 0
    """Prompts in play beside the step's, over all ranks: the most that may be carried over; at most
    prompts_per_step."""
    max_staleness: int = 1
    """Steps that may lie between a trajectory's oldest turn and the step that trains on it."""

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
        """Raise `ConfigError` if a set is so small that a question could be dealt again while it is still in play."""
        # The sampler checks for questions in play only at the beginning of an epoch.
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
    """Prompts per step over all ranks; must be a multiple of the engine replicas (paper: 64)."""
    group_size: int = 16
    """Trajectories per prompt, G (paper: 16)."""
    dynamic_sampling: bool = False
    """DAPO: drop groups whose outcome rewards are all equal and draw other prompts until the step is full."""
    max_draws: int = 10
    """Times a step may draw prompts under dynamic_sampling; what is then missing is filled with dropped groups."""
    temperature: float = 1.0
    """Sampling temperature T (paper: 1.0). Ratios, KL, entropy and likelihood are those of softmax(logits / T), which
    the tokens were sampled from; information gain is measured at temperature 1."""
    top_p: float = 1.0
    """Nucleus sampling threshold, for evaluation with samples only; 1.0 for training (paper: 1.0)."""
    max_turns: int = 6
    """Tool calls a trajectory may make (paper: 6); a call past that ends it."""
    max_turn_tokens: int = 1024
    """Longest single generation, tokens."""
    max_response_tokens: int = 6192
    """Sampled and observation tokens of one trajectory together (paper: 6192)."""
    tensor_parallel: int = 1
    """Ranks that share one engine."""
    check_lockstep_every: int = 1
    """Engine passes between two comparisons of what the ranks that share an engine have scheduled, sampled and freed;
    0: never. At 1 a difference ends the run in one line before it does harm; at more it may break a pass first."""
    dtype: str = "auto"
    """Number format of the engine's weights: auto (the model's) | bfloat16 | float32."""
    quantization: str = "none"
    """none | fp8 | fp8_per_channel: linear layers in e4m3, quantised whenever weights are loaded; GPU only. A scale
    is shared by 128x128 weights and 128 activations (fp8), or by a row of weights and a token (fp8_per_channel)."""
    max_concurrent: int = 256
    """Trajectories decoded at once by one engine."""
    kv_cache_gib: float = 0.0
    """Memory for the KV cache on each rank of the engine, GiB; 0, on a GPU only: chosen with `gpu_memory_fraction`,
    or what a fraction that is set leaves, as vLLM measures it at the start."""
    gpu_memory_fraction: float = 0.0
    """The engine's share of the GPU, which must be free when the engine starts; 0: chosen by the plan, so that a
    tenth of the card is left over in the rollout. `tools/plan.py` and a dry run print what is chosen."""
    block_size: int = 0
    """Tokens in one KV block; 0: 32 on CPU, 16 on GPU."""
    enforce_eager: bool = False
    """Skip graph capture and compilation; always on where there is no GPU."""
    async_scheduling: bool = False
    """Let vLLM schedule the next step while the card computes this one (GPU only). Off until measured on a card:
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
        require(
            self.check_lockstep_every >= 0,
            "rollout.check_lockstep_every",
            self.check_lockstep_every,
            ">= 0",
        )
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
            f"at most rollout.prompts_per_step ({self.prompts_per_step}), or a step could not take all that is due",
        )
        # vLLM raises lower temperatures to 0.01.
        require(0.01 <= self.temperature <= 2, "rollout.temperature", self.temperature, "in [0.01, 2]")
        require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "in (0, 1]")
        require(
            self.dtype in ("auto", "bfloat16", "float32"),
            "rollout.dtype",
            self.dtype,
            "auto | bfloat16 | float32",
        )
        require(
            self.quantization in ("none", "fp8", "fp8_per_channel"),
            "rollout.quantization",
            self.quantization,
            "none | fp8 | fp8_per_channel",
        )
        require(
            self.quantization == "none" or self.dtype != "float32",
            "rollout.quantization",
            self.quantization,
            "none with rollout.dtype float32",
        )
        require(self.kv_cache_gib >= 0, "rollout.kv_cache_gib", self.kv_cache_gib, ">= 0")
        require(
            0 <= self.gpu_memory_fraction <= 0.95,
            "rollout.gpu_memory_fraction",
            self.gpu_memory_fraction,
            "in (0, 0.95], or 0: chosen by the plan",
        )

    def check_training(self) -> None:
        """Raise `ConfigError` if rollouts with these settings could not be trained on."""
        # The engine gives probability 0 to tokens outside the nucleus, but the trainer does not: the gradient would
        # be biased.
        require(
            self.top_p == 1,
            "rollout.top_p",
            self.top_p,
            "1.0 for training, since the trainer's log-probs are those of the whole distribution; "
            "below 1 in tools/evaluate.py and tools/chat.py",
        )
