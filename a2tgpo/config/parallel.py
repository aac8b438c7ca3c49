"""Settings of the parallel groups."""

from dataclasses import dataclass

from a2tgpo.io.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Groups of the training processes. The data-parallel size is ranks / (tensor x context x pipeline)."""

    tensor: int = 1
    """Number of tensor-parallel ranks. It must divide the number of attention heads, the number of KV heads, and the
    size of the padded vocabulary."""
    sequence: bool = False
    """Sequence parallelism within each tensor-parallel group; needs tensor > 1."""
    context: int = 1
    """Number of context-parallel ranks. Each rank holds 1 / context of every trajectory's tokens."""
    expert: int = 1
    """Number of expert-parallel ranks in a mixture of experts. Each rank holds 1 / expert of every layer's experts.
    The number must divide the number of experts, and the number of ranks of a pipeline stage (tensor x context x
    data-parallel). A dense model needs 1."""
    pipeline: int = 1
    """Number of pipeline stages. It must divide the number of layers, unless first_stage_layers or last_stage_layers
    is set."""
    virtual: int = 1
    """Number of model chunks per pipeline stage (interleaved 1F1B). It must divide every stage's number of layers. A
    number > 1 needs pipeline > 1."""
    first_stage_layers: int = 0
    """Number of layers in the first pipeline stage, which also holds the embedding; 0: as many as in other stages."""
    last_stage_layers: int = 0
    """Number of layers in the last pipeline stage, which also holds the output layer; 0: as many as in other
    stages."""
    timeout_s: float = 7200.0
    """Seconds that a rank waits in one collective before the job ends."""
    start_timeout_s: float = 300.0
    """Before a run begins, its ranks wait this many seconds for the last rank to arrive. The ranks then have the
    same time again to check their machines and to connect."""

    def __post_init__(self) -> None:
        for name in ("tensor", "context", "expert", "pipeline", "virtual"):
            require(getattr(self, name) >= 1, f"parallel.{name}", getattr(self, name), ">= 1")
        require(
            not self.sequence or self.tensor > 1,
            "parallel.sequence",
            self.sequence,
            "true only with parallel.tensor > 1",
        )
        for name in ("first_stage_layers", "last_stage_layers"):
            require(getattr(self, name) >= 0, f"parallel.{name}", getattr(self, name), ">= 0")
        for name, unset in (("virtual", 1), ("first_stage_layers", 0), ("last_stage_layers", 0)):
            require(
                self.pipeline > 1 or getattr(self, name) == unset,
                f"parallel.{name}",
                getattr(self, name),
                f"{unset} with one pipeline stage; set parallel.pipeline",
            )
        for name in ("timeout_s", "start_timeout_s"):
            require(getattr(self, name) > 0, f"parallel.{name}", getattr(self, name), "> 0")

    @property
    def model_ranks(self) -> int:
        """Number of ranks that together hold one replica of the model."""
        return self.tensor * self.context * self.pipeline

    def stage_layers(self, num_layers: int) -> list[int]:
        """Return how many of a model's `num_layers` decoder layers each pipeline stage holds.

        Each chunk of stage s holds `stage_layers[s] / virtual` layers. A forward pass runs chunk 0 of every stage,
        then chunk 1 of every stage, and so on.

        Raises:
            ConfigError: with a one-line message, if the layers cannot be divided over the stages and chunks.
        """
        set_layers = self.first_stage_layers + self.last_stage_layers
        num_even = self.pipeline - (self.first_stage_layers > 0) - (self.last_stage_layers > 0)
        remaining = num_layers - set_layers
        if set_layers == 0 and num_layers % self.pipeline:
            raise ConfigError(
                f"parallel.pipeline is {self.pipeline}; allowed: a divisor of the model's {num_layers} layers, or "
                "others with parallel.first_stage_layers or parallel.last_stage_layers"
            )
        fits = remaining == 0 if num_even == 0 else remaining > 0 and remaining % num_even == 0
        if not fits:
            raise ConfigError(
                f"parallel.first_stage_layers ({self.first_stage_layers}) and parallel.last_stage_layers "
                f"({self.last_stage_layers}) leave {remaining} of the model's {num_layers} layers; allowed: "
                + (
                    "0, with both set and two stages"
                    if num_even == 0
                    else f"a multiple of the other {num_even} stages"
                )
            )
        even = remaining // num_even if num_even else 0
        stages = [even] * self.pipeline
        stages[0] = self.first_stage_layers or even
        stages[-1] = self.last_stage_layers or even
        if uncut := [layers for layers in stages if layers % self.virtual]:
            raise ConfigError(
                f"parallel.virtual is {self.virtual}; allowed: a divisor of the {uncut[0]} layers of a pipeline stage"
            )
        return stages
