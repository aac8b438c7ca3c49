"""How the processes are laid out."""

from dataclasses import dataclass

from a2tgpo.config.check import require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Training layout; the data-parallel size is what remains: world / (tensor x pipeline)."""

    tensor: int = 1
    """Tensor-parallel ranks; must divide attention heads, KV heads and the padded vocabulary."""
    pipeline: int = 1
    """Pipeline stages; must divide the number of layers."""
    sequence: bool = False
    """Sequence parallelism inside a tensor-parallel group; needs tensor > 1."""
    expert: int = 1
    """Expert-parallel ranks of a mixture of experts, each with its share of every layer's experts; must divide the
    experts and the ranks of a pipeline stage, tensor x data-parallel. A dense model takes 1."""
    timeout_s: float = 7200.0
    """Longest wait in one collective before the job is ended, seconds."""

    def __post_init__(self) -> None:
        require(self.tensor >= 1, "parallel.tensor", self.tensor, ">= 1")
        require(self.pipeline >= 1, "parallel.pipeline", self.pipeline, ">= 1")
        require(self.expert >= 1, "parallel.expert", self.expert, ">= 1")
        require(
            not self.sequence or self.tensor > 1,
            "parallel.sequence",
            self.sequence,
            "true only with parallel.tensor > 1",
        )
        require(self.timeout_s > 0, "parallel.timeout_s", self.timeout_s, "> 0")
