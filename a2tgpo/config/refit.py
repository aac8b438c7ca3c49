"""The transfer of trained weights to the engine."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    bucket_mib: int = 256
    """Largest group of weights gathered at once, MiB; two groups are alive, one loading and the next in flight."""
    probe_tokens: int = 64
    """Length of the fixed probe sequence whose log-probs are compared after every refit, tokens."""
    probe_tolerance: float = 0.0
    """Largest mean |difference| per probe token, nats; 0: 1e-3 in float32, 0.15 in bfloat16, 0.8 in FP8."""

    def __post_init__(self) -> None:
        require(self.bucket_mib >= 1, "refit.bucket_mib", self.bucket_mib, ">= 1")
        require(self.probe_tokens >= 8, "refit.probe_tokens", self.probe_tokens, ">= 8")
        require(self.probe_tolerance >= 0, "refit.probe_tolerance", self.probe_tolerance, ">= 0")
