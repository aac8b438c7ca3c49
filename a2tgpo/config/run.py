"""The whole configuration, and its sections `run` and `checkpoint`."""

from dataclasses import dataclass, field

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.cluster import ClusterConfig
from a2tgpo.config.combinations import check_combinations
from a2tgpo.config.data import CHAT_INSTRUCTIONS, SEARCH_INSTRUCTIONS, DataConfig
from a2tgpo.config.evaluation import EvaluationConfig
from a2tgpo.config.expand import Expanded
from a2tgpo.config.guard import GuardConfig
from a2tgpo.config.judge import JudgeConfig
from a2tgpo.config.mcp import McpConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.profile import ProfileConfig
from a2tgpo.config.python import LONGEST_START_S, PythonConfig
from a2tgpo.config.refit import RefitConfig
from a2tgpo.config.reward import RewardConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.search import SearchConfig
from a2tgpo.config.tools import CalculatorConfig, ToolsConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.config.warmstart import WarmstartConfig
from a2tgpo.config.watchdog import WatchdogConfig
from a2tgpo.config.web import VisitConfig, WebConfig
from a2tgpo.io.errors import one_of, require

MAX_NAME_BYTES = 200
SCORED_ANSWER_TOKENS = 64
"""Number of tokens reserved for the scaffold and the gold answer after a response of full length."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    name: Expanded
    """Name of the run and of its folder in `root`, at most 200 bytes in UTF-8."""
    root: Expanded = "runs"
    """Folder of all runs."""
    steps: int = 240
    """Number of training steps (paper: about 240)."""
    seed: int = 0
    """Seed (below 2^32) for choosing prompts, for sampling rollouts, and for all random generators at the start.
    Results do not depend on the layout of the processes."""
    deterministic: bool = False
    """Compute in a fixed order on GPUs, so that two runs with the same settings on the same machines are equal to the
    bit. Rollouts and updates then become slower, and the GPUs need compute capability 9.0 or higher. Runs on CPUs are
    always reproducible."""
    log_rollouts: int = 8
    """Number of trajectories per step that TensorBoard shows: half of them the best, half the worst. The run's folder
    rollouts/ has all trajectories."""
    keep_rollouts_gb: float = 100.0
    """GB of disk space for recorded rollouts; 0: no limit. If the rollouts need more, only rollouts of steps
    before the newest checkpoint are removed, the oldest first. The rollouts of every 100th step are removed
    last."""

    def __post_init__(self) -> None:
        require(
            # File systems allow names of 255 bytes, which must suffice for suffixes such as ".previous_12", too.
            0 < len(self.name.encode()) <= MAX_NAME_BYTES
            and self.name.isprintable()
            and "/" not in self.name
            and self.name not in (".", ".."),
            "run.name",
            self.name,
            f"a folder name without /, of printable characters, at most {MAX_NAME_BYTES} bytes in UTF-8",
        )
        require(self.steps >= 1, "run.steps", self.steps, ">= 1")
        # vLLM passes the seed to NumPy's generator, which accepts only seeds below 2^32.
        require(0 <= self.seed < 2**32, "run.seed", self.seed, "0 to 4294967295 (2^32 - 1)")
        require(self.log_rollouts >= 0, "run.log_rollouts", self.log_rollouts, ">= 0")
        require(self.keep_rollouts_gb >= 0, "run.keep_rollouts_gb", self.keep_rollouts_gb, ">= 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 20
    """Number of steps between checkpoints; 0: only after the last step."""
    keep: int = 2
    """Number of newest checkpoints that are kept whole, so that a run can resume from them."""
    keep_every: int = 0
    """The weights of an older checkpoint are kept if its step is a multiple of this number. `0`: none are kept."""
    keep_gb: float = 0.0
    """GB of disk space for weights of older checkpoints; 0: no limit. The oldest weights are removed first. The
    weights of the best checkpoint are never removed."""
    keep_previous: int = 0
    """A start with --resume none renames the run's old folder to NAME.previous_N. The newest of these folders are
    kept, up to this number; 0: all."""
    max_failures: int = 3
    """Number of consecutive failed saves after which the run ends."""
    margin_s: float = 120.0
    """A run in a Slurm job stops in time to save before the job's end (SLURM_JOB_END_TIME). The run reserves the
    time of the longest update and save so far, plus this many seconds."""
    best_by: str = "em"
    """Held-out score that decides which checkpoint is the best: `em`, `em_format_gated`, `f1`, `reward` (the weighted
    sum of the rewards), or the name of a reward of reward.names. With evaluation.samples, `mean_at_K` and `pass_at_K`
    are allowed, too. `SET/em` is the EM on the set SET of evaluation.sets. The weights of the best checkpoint are
    kept. `none`: no checkpoint is the best."""

    def __post_init__(self) -> None:
        for name in ("every", "keep_every", "keep_gb", "keep_previous", "margin_s"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}", getattr(self, name), ">= 0")
        for name in ("keep", "max_failures"):
            require(getattr(self, name) >= 1, f"checkpoint.{name}", getattr(self, name), ">= 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run."""

    run: RunSettings
    model: ModelConfig
    data: DataConfig
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    calculator: CalculatorConfig = field(default_factory=CalculatorConfig)
    python: PythonConfig = field(default_factory=PythonConfig)
    web: WebConfig = field(default_factory=WebConfig)
    visit: VisitConfig = field(default_factory=VisitConfig)
    mcp: McpConfig = field(default_factory=McpConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    warmstart: WarmstartConfig = field(default_factory=WarmstartConfig)

    def __post_init__(self) -> None:
        if "search" in self.tools.names:
            self.search.require_source()
            if self.search.backend == "http":
                self._check_server_limits()
        self._check_tools()
        scores = self.evaluation.score_names(("reward", *self.reward.labels))
        require(
            self.checkpoint.best_by in (*scores, "none"),
            "checkpoint.best_by",
            self.checkpoint.best_by,
            one_of((*scores, "none"), self.checkpoint.best_by),
        )
        require(
            all(step <= self.run.steps for step in self.profile.steps),
            "profile.steps",
            list(self.profile.steps),
            f"steps of the run, 1 to run.steps ({self.run.steps})",
        )
        require(
            self.rollout.prompts_per_step % self.update.prompts_per_minibatch == 0,
            "update.prompts_per_minibatch",
            self.update.prompts_per_minibatch,
            f"a divisor of rollout.prompts_per_step ({self.rollout.prompts_per_step})",
        )
        if "judge" in self.reward.names:
            self.judge.require_server(timeout_s=self.reward.timeout_s)
        require(
            self.reward.overlong_buffer_tokens < self.rollout.max_response_tokens,
            "reward.overlong_buffer_tokens",
            self.reward.overlong_buffer_tokens,
            f"below rollout.max_response_tokens ({self.rollout.max_response_tokens})",
        )
        require(
            self.rollout.quantization == "none" or self.algorithm.correction.kind != "none",
            "rollout.quantization",
            self.rollout.quantization,
            "none without algorithm.correction, since a quantised engine samples from another policy than the "
            "trainer's; "
            "set algorithm.correction.kind=truncate or mask",
        )
        require(
            not self.rollout.partial.is_on or self.algorithm.correction.kind != "none",
            "rollout.partial.tokens_per_step",
            self.rollout.partial.tokens_per_step,
            "0 without algorithm.correction, since an earlier policy sampled the turns of earlier steps; "
            "set algorithm.correction.kind=truncate or mask",
        )
        require(
            self.rollout.top_p == 1 or not self.run.deterministic,
            "rollout.top_p",
            self.rollout.top_p,
            "1 with run.deterministic=true, since the sums of the nucleus have no fixed order on GPUs",
        )
        self._check_gain()

    def _check_tools(self) -> None:
        """Check that the tools have the settings they need, and that `tools.call_timeout_s` gives calls enough
        time."""
        if "web_search" in self.tools.names or (
            "visit" in self.tools.names and self.web.backend == "recorded"
        ):
            self.web.require_source()
        if "mcp" in self.tools.names:
            self.mcp.require_server()
        longest_s = {
            "python": self.python.timeout_s + LONGEST_START_S,
            "web_search": self.web.longest_call_s,
            "visit": self.visit.longest_call_s,
            "mcp": self.mcp.timeout_s,
        }
        for name, seconds in longest_s.items():
            require(
                name not in self.tools.names or seconds <= self.tools.call_timeout_s,
                "tools.call_timeout_s",
                self.tools.call_timeout_s,
                f">= {seconds:g}, the longest time that a call of {name} takes",
            )

    def _check_gain(self) -> None:
        """Check that `gain.scorer` and `gain.verify_every` fit the other settings."""
        gain, context = self.rollout.gain, self.parallel.context
        by_reference = gain.scorer == "reference"
        require(
            not by_reference or self.algorithm.uses_gain,
            "rollout.gain.scorer",
            gain.scorer,
            "policy with algorithm.turn_signal=scores, which scores no gold answers",
        )
        require(
            not by_reference or context == 1,
            "rollout.gain.scorer",
            gain.scorer,
            f"policy with parallel.context ({context}) > 1, which cannot divide a trajectory with its probes",
        )
        require(
            gain.verify_every == 0 or self.algorithm.uses_gain,
            "rollout.gain.verify_every",
            gain.verify_every,
            "0 with algorithm.turn_signal=scores, which scores no gold answers",
        )
        require(
            gain.verify_every == 0 or not by_reference,
            "rollout.gain.verify_every",
            gain.verify_every,
            "0 with rollout.gain.scorer=reference, since the engine then scores no gold answers",
        )
        require(
            gain.verify_every == 0 or context == 1,
            "rollout.gain.verify_every",
            gain.verify_every,
            f"0 with parallel.context ({context}) > 1, which cannot divide a trajectory with its probes",
        )

    def _check_server_limits(self) -> None:
        tools, longest_s = self.tools, self.search.longest_call_s
        require(
            tools.on_outage != "wait" or tools.outage_limit_s < self.parallel.timeout_s,
            "tools.outage_limit_s",
            tools.outage_limit_s,
            f"below parallel.timeout_s ({self.parallel.timeout_s:g}), after which waiting ranks give up",
        )
        require(
            tools.call_timeout_s >= longest_s,
            "tools.call_timeout_s",
            tools.call_timeout_s,
            f">= 2 x search.request_timeout_s x (search.max_attempts + 1) ({longest_s:g}), or a search could be "
            "given up before its last attempt",
        )

    def check_training(self) -> None:
        """Raise `ConfigError` if training on the rollouts would have no effect or be wrong.

        This method loads the user's files that `algorithm` names.
        """
        self.rollout.check_training()
        check_combinations(self)
        for part, spec in self.algorithm.parts:
            part.load(spec)
        require(
            bool(self.data.train), "data.train", self.data.train, "a file, or a mapping of files to weights"
        )
        require(
            bool(self.data.test or self.evaluation.sets),
            "data.test",
            self.data.test,
            "a question file; it may be left out if evaluation.sets names files",
        )
        require(
            self.rollout.group_size > 1 or self.algorithm.advantage != "turn_group",
            "rollout.group_size",
            self.rollout.group_size,
            ">= 2 with algorithm.advantage=turn_group, which compares the trajectories of a prompt: a single "
            "one has advantage 0",
        )
        require(
            self.algorithm.kl_coef == 0 or self.algorithm.kl_estimator != "k1",
            "algorithm.kl_estimator",
            self.algorithm.kl_estimator,
            "k2 | k3 with algorithm.kl_coef > 0: the expected gradient of k1 is 0, so it would restrain nothing",
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the run loads a reference model: for the KL penalty, or to score the gold answers."""
        return self.algorithm.kl_coef > 0 or self.rollout.gain.scorer == "reference"

    @property
    def engine_scores_gain(self) -> bool:
        """Whether the engine scores the gold answers during the rollout."""
        return self.algorithm.uses_gain and self.rollout.gain.scorer == "policy"

    @property
    def instructions(self) -> str:
        """The system message of the prompts, or "" if they have none."""
        if self.rollout.protocol == "chat" and self.data.instructions == SEARCH_INSTRUCTIONS:
            return CHAT_INSTRUCTIONS
        return self.data.instructions

    @property
    def max_model_len(self) -> int:
        """Tokens of the engine's longest sequence: a prompt, a response, and a gold answer to score."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens + SCORED_ANSWER_TOKENS
