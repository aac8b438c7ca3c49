"""Settings of the refit, which transfers the trained weights to the engine."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    bucket_mib: int = 256
    """Size, in MiB, of a bucket: the weights that are gathered at once. Two buckets are in memory at a time: the
    engine loads one while the other is gathered."""
    probe_tokens: int = 64
    """Length, in tokens, of a fixed probe sequence. After every refit, trainer and engine compute the sequence's
    log-probs, and the results are compared."""
    probe_tolerance: float = 0.0
    """Largest allowed mean |difference|, in nats per token, between the log-probs of the probe in trainer and engine.
    `0`: 1e-3 in float32, 0.15 in bfloat16, 0.8 in FP8."""

    def __post_init__(self) -> None:
        require(self.bucket_mib >= 1, "refit.bucket_mib", self.bucket_mib, ">= 1")
        require(self.probe_tokens >= 8, "refit.probe_tokens", self.probe_tokens, ">= 8")
        require(self.probe_tolerance >= 0, "refit.probe_tolerance", self.probe_tolerance, ">= 0")
