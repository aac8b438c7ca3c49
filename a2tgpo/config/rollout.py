"""Settings of the rollout: multi-turn generation, the engine, and information gain."""

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Literal

from a2tgpo.io.errors import one_of, require

FORMATS_PACKAGE = "a2tgpo.protocol.formats"

GPU_STEP_TOKENS = 8192
"""Maximum number of tokens, in prefill and decoding together, that an engine on a GPU processes in one engine step.
vLLM's general default is only 2,048 (vllm/engine/arg_utils.py, get_batch_defaults)."""


def call_formats() -> list[str]:
    """Return the names of all call formats, which are the modules in protocol/formats/."""
    # List the modules without importing them.
    package = importlib.import_module(FORMATS_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


@dataclass(frozen=True, kw_only=True)
class GainConfig:
    """How information gain is computed (Eq. 2-3)."""

    scorer: Literal["policy", "reference"] = "policy"
    """The model whose probabilities of the gold answer define the gains. `policy`: the current policy; the engine
    computes the probabilities during the rollout (paper). `reference`: the frozen initial policy; the trainer
    computes the probabilities after the rollout."""
    measure: Literal["probability", "log_probability"] = "probability"
    """`probability`: a gain is a difference of probabilities (Eq. 3). `log_probability`: a gain is a difference of
    mean log-probs, as in the authors' released code."""
    answer_reduction: Literal["first", "max"] = "first"
    """`first`: score only the first gold answer. `max`: score all aliases, and use each turn's most probable
    alias."""
    max_aliases: int = 8
    """Maximum number of aliases that answer_reduction=max scores. An alias that is too long is ignored."""
    scaffold: str = "</think> <answer> \\boxed{"
    """Text between a context and the gold answer. A leading </think> is left out if the context has no open thought.
    A leading <think> is left out if the context has an open thought. With rollout.protocol=chat, the default is
    \\boxed{, preceded by an empty thought if the model thinks. Any other text is used unchanged."""
    verify_every: int = 0
    """Number of steps between checks. In a check, the trainer also scores gold answers, and the difference from the
    engine's scores is logged as `gain/engine_trainer_gap`. `0`: no checks."""
    verify_trajectories: int = 4
    """Number of trajectories that a check scores on each data-parallel replica."""

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
    """Partial rollouts: a step does not wait for its longest trajectories, and the next step continues them
    (docs/performance.md). Partial rollouts need `algorithm.correction`.
    """

    tokens_per_step: int = 0
    """After a trajectory has sampled this many tokens in a step, it begins no further turn in the step. `0`: no
    partial rollouts."""
    extra_prompts: int = 0
    """Number of prompts, over all ranks, that are played in addition to prompts_per_step; at most prompts_per_step.
    The next step continues the trajectories of at most this many prompts."""
    max_staleness: int = 1
    """Maximum number of steps between a trajectory's oldest turn and the training step that uses the trajectory."""

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


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """Trajectories that branch between turns, for algorithm.advantage=at2po and tree_grpo (docs/methods.md)."""

    initial: int = 0
    """Number of trajectories of a prompt that begin at the prompt. The other trajectories, up to group_size, branch
    from trajectories of the same prompt that have ended. `0`: no branches."""
    rounds: int = 1
    """Number of rounds in which the branches begin. In a later round, branches can branch again."""
    choice: Literal["entropy", "random"] = "entropy"
    """`entropy`: a branch plays a turn again, one of those with the highest entropy (AT2PO). `random`: a branch
    continues after a turn that is drawn at random, and each tree gets the same number of branches (Tree-GRPO)."""
    sibling_penalty: float = 0.05
    """For choice=entropy: nats that are subtracted from a turn's entropy for each sibling of the turn. Siblings are
    turns that follow the same turn."""

    def __post_init__(self) -> None:
        require(self.initial >= 0, "rollout.tree.initial", self.initial, ">= 0")
        require(self.rounds >= 1, "rollout.tree.rounds", self.rounds, ">= 1")
        require(self.sibling_penalty >= 0, "rollout.tree.sibling_penalty", self.sibling_penalty, ">= 0")

    @property
    def is_on(self) -> bool:
        return self.initial > 0

    def round_sizes(self, group_size: int) -> list[int]:
        """Return the number of initial trajectories, and the number of branches in each round."""
        branches = group_size - self.initial
        return [self.initial, *((branches + place) // self.rounds for place in reversed(range(self.rounds)))]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Limits of a step's rollout, and settings of its engines."""

    prompts_per_step: int = 64
    """Number of prompts per step over all ranks (paper: 64); a multiple of the number of engines."""
    assignment: Literal["fixed", "on_demand"] = "fixed"
    """Which engine plays a prompt (docs/performance.md). `fixed`: each engine plays an equal share of the prompts.
    `on_demand`: each engine begins with only as many prompts as fill its slots (max_concurrent). When an engine has a
    free slot, it takes the next prompt that no engine has begun."""
    group_size: int = 16
    """G, the number of trajectories per prompt (paper: 16)."""
    dynamic_sampling: bool = False
    """DAPO's dynamic sampling: drop a group if all its outcome rewards are equal, and draw prompts until the step has
    prompts_per_step groups."""
    max_draws: int = 10
    """With dynamic_sampling, a step draws prompts at most this many times. If groups are then still missing, dropped
    groups fill the step."""
    temperature: float = 1.0
    """Sampling temperature T (paper: 1.0). Ratios, KL, entropy and likelihood use softmax(logits / T). Information
    gain uses temperature 1."""
    top_p: float = 1.0
    """Threshold of nucleus sampling. It must be 1.0 in training, and may be lower in an evaluation."""
    protocol: Literal["tags", "chat"] = "tags"
    """How the policy calls tools (docs/protocols.md). `tags`: a call is <search> query </search>, and its result is
    text in <result> tags (paper). `chat`: a call has the form of the model's own chat template, and its result is a
    message of role `tool`."""
    call_format: str = "auto"
    """With protocol=chat, the form of a call: `hermes`, `llama_json`, `qwen_xml`, or another module in
    protocol/formats/. `auto`: the form in which the chat template writes calls."""
    max_calls_per_turn: int = 4
    """With protocol=chat, maximum number of calls in one turn. These calls run at the same time. Further calls of the
    turn get an error as their result."""
    strict_format: bool = True
    """With protocol=chat, the rule for a well-formed response. `true`: no turn may have a wrong call, and each turn
    of a thinking model must have one thought. `false`: only the last turn, which has the answer, is checked."""
    max_turns: int = 6
    """Maximum number of turns with tool calls in a trajectory (paper: 6). One more turn with calls ends the
    trajectory."""
    max_turn_tokens: int = 1024
    """Maximum number of tokens that the policy may sample in one turn."""
    max_response_tokens: int = 6192
    """Maximum number of sampled tokens and observation tokens, together, in one trajectory (paper: 6192)."""
    tensor_parallel: int = 1
    """Number of ranks that share one engine."""
    check_lockstep_every: int = 1
    """Number of engine passes after which the ranks of one engine compare their requests and sampled tokens; 0:
    never. With 1, a difference ends the run before the run uses the tokens."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the engine's weights; `auto`: model.dtype."""
    quantization: Literal["none", "fp8", "fp8_per_channel"] = "none"
    """Quantise linear layers to e4m3 when weights are loaded; GPUs only. `fp8`: one scale for each block of 128x128
    weights, and one for every 128 activations. `fp8_per_channel`: one scale for each row of weights, and one for all
    activations of a token."""
    router_replay: bool = False
    """Let the trainer use the experts that the engine chose for each token (docs/parallelism.md). This needs a
    mixture of experts, and vLLM's model runner for GPUs."""
    max_concurrent: int = 256
    """Maximum number of trajectories that one engine decodes at a time."""
    kv_cache_gib: float = 0.0
    """GiB of KV cache on each rank of the engine; 0 is allowed only on GPUs. With 0, the KV cache gets the rest
    of the engine's memory (gpu_memory_fraction). If gpu_memory_fraction is 0 too, the plan chooses both."""
    gpu_memory_fraction: float = 0.0
    """Share of the GPU's memory that the engine takes. The share must be free when the engine starts. `0`: the plan
    chooses a share that leaves a tenth of the memory free. `tools/plan.py` prints this share."""
    block_size: int = 0
    """Number of tokens in one block of the KV cache; 0: 32 on CPUs, 16 on GPUs."""
    enforce_eager: bool = False
    """Make vLLM skip graph capture and compilation. On CPUs, vLLM always skips them."""
    async_scheduling: bool = False
    """Let vLLM schedule the next engine step while the GPU computes the current step. Measure its effect with
    `tools/gpu_check.py --checks engine_speed`."""
    gain: GainConfig = field(default_factory=GainConfig)
    partial: PartialConfig = field(default_factory=PartialConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    inner_branches: int = 0
    """Number of further trajectories of a prompt, which branch off inside turns of the prompt's group_size
    trajectories (docs/methods.md). algorithm.advantage=appo needs their outcomes. No step trains on them."""

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
            "max_calls_per_turn",
        ):
            require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), ">= 1")
        formats = ["auto", *call_formats()]
        require(
            self.call_format in (formats if self.protocol == "chat" else ["auto"]),
            "rollout.call_format",
            self.call_format,
            one_of(formats, self.call_format)
            if self.protocol == "chat"
            else "auto with rollout.protocol=tags",
        )
        require(
            self.strict_format or self.protocol == "chat",
            "rollout.strict_format",
            self.strict_format,
            "true with rollout.protocol=tags",
        )
        for name in ("check_lockstep_every", "kv_cache_gib"):
            require(getattr(self, name) >= 0, f"rollout.{name}", getattr(self, name), ">= 0")
        require(
            self.group_size > 1 or not self.dynamic_sampling,
            "rollout.group_size",
            self.group_size,
            ">= 2 with rollout.dynamic_sampling",
        )
        require(
            not (self.partial.is_on and self.assignment == "on_demand"),
            "rollout.assignment",
            self.assignment,
            "fixed with rollout.partial.tokens_per_step > 0, since a group that is carried over stays on its engine",
        )
        require(
            self.partial.extra_prompts <= self.prompts_per_step,
            "rollout.partial.extra_prompts",
            self.partial.extra_prompts,
            f"at most rollout.prompts_per_step ({self.prompts_per_step}), since one step must be able to take "
            "all carried-over groups",
        )
        self._check_tree()
        self._check_inner_branches()
        # vLLM raises temperatures below 0.01 to 0.01.
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

    def _check_tree(self) -> None:
        require(
            self.tree.initial < self.group_size,
            "rollout.tree.initial",
            self.tree.initial,
            f"below rollout.group_size ({self.group_size}), which includes the branches",
        )
        branches = self.group_size - self.tree.initial
        require(
            not self.tree.is_on or self.tree.rounds <= branches,
            "rollout.tree.rounds",
            self.tree.rounds,
            f"at most {branches}, the number of branches (rollout.group_size - rollout.tree.initial)",
        )
        require(
            not (self.tree.is_on and self.partial.is_on),
            "rollout.tree.initial",
            self.tree.initial,
            "0 with rollout.partial.tokens_per_step > 0, since trajectories branch only after they have ended",
        )

    def check_questions(self, num_questions: int) -> None:
        """Raise `ConfigError` if a step with partial rollouts plays more questions than data.train has."""
        extra = self.partial.extra_prompts
        require(
            extra == 0 or self.prompts_per_step + extra <= num_questions,
            "rollout.partial.extra_prompts",
            extra,
            f"0, or rollout.prompts_per_step + extra_prompts ({self.prompts_per_step + extra}) at most the number of "
            f"questions in data.train ({num_questions})",
        )

    def _check_inner_branches(self) -> None:
        key, count = "rollout.inner_branches", self.inner_branches
        require(count >= 0, key, count, ">= 0")
        require(
            count == 0 or not self.partial.is_on,
            key,
            count,
            "0 with rollout.partial.tokens_per_step > 0, since trajectories branch only after they have ended; set "
            "rollout.inner_branches=0 or rollout.partial.tokens_per_step=0",
        )

    @property
    def describes_tools(self) -> bool:
        """Whether the prompts describe the tools."""
        return self.protocol == "chat"

    def check_training(self) -> None:
        """Raise `ConfigError` if training on the trajectories would be wrong."""
        # Tokens outside the nucleus have probability 0 only in the engine, so the gradient would be biased.
        require(
            self.top_p == 1,
            "rollout.top_p",
            self.top_p,
            "1.0 for training, since the trainer's log-probs are those of the whole distribution; "
            "below 1 in tools/evaluate.py and tools/chat.py",
        )
