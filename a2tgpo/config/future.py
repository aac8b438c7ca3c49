"""Settings of APPO's token credit, which depends on how updates change the log-probs of later tokens."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class FutureConfig:
    """The future influence f of a token grows if the policy's updates have made the tokens after it more probable.

    Only `algorithm.token_credit: appo` and your own token credits use these settings.
    """

    half_life: float = 64.0
    """Number of sampled tokens after which the influence of a later token is halved (APPO: 64)."""
    upper: float = 0.2
    """The largest f is 1 + upper (APPO: 0.2). The smallest f is 1, or 0.8 for a token whose ratio exceeds 6 and whose
    advantage is negative. The largest f of such a token is 1."""
    weight: float = 1.0
    """An advantage is multiplied by 1 + weight f (APPO: 1). Before the first update of a step, f is 1, so a weight of
    1 doubles all advantages."""

    def __post_init__(self) -> None:
        key = "algorithm.future"
        require(self.half_life > 0, f"{key}.half_life", self.half_life, "> 0")
        require(self.upper >= 0, f"{key}.upper", self.upper, ">= 0")
        require(self.weight >= 0, f"{key}.weight", self.weight, ">= 0")
