"""Settings of contrast prompts, and of GCPO, which uses them to weigh tokens."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """The contrast prompt of a question is the question's prompt with other instructions to the policy.

    Before each update, the policy computes the log-probs of the sampled tokens after the contrast prompt. Tokens
    whose log-probs differ most from those after the real prompt depend most on the instructions. Only
    `algorithm.token_credit: gcpo` and your own token credits use contrast prompts.
    """

    prompt_suffix: str = "\n\nNote: Intentionally generate an incorrect answer."
    """Text that follows the question in its contrast prompt. With this text, the prompt must not have more than
    data.max_prompt_tokens tokens."""
    level: Literal["token", "turn"] = "token"
    """Unit that has one weight. `turn`: the turns of a trajectory are ranked by the mean divergence of their tokens.
    algorithm.ratio=turn needs level=turn."""
    top_share: float = 0.4
    """Share of the ranked units that together get `top_mass` of the weight (GCPO: 0.4)."""
    top_mass: float = 0.8
    """Share of the total weight that goes to the units selected by `top_share`; at least `top_share` (GCPO: 0.8). If
    `top_mass` equals `top_share`, all weights are 1."""

    def __post_init__(self) -> None:
        key = "algorithm.contrast"
        require(bool(self.prompt_suffix), f"{key}.prompt_suffix", self.prompt_suffix, "a text")
        require(0 < self.top_share < 1, f"{key}.top_share", self.top_share, "in (0, 1)")
        is_share = self.top_share <= self.top_mass < 1
        require(
            is_share, f"{key}.top_mass", self.top_mass, f">= {key}.top_share ({self.top_share:g}) and below 1"
        )
