"""Gold answers as the tokens that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from a2tgpo.config.rollout import GainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerTokens:
    """Tokenises scaffold and answers, each on its own: the scored span is the answer's, whatever stands before."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: GainConfig):
        self._tokenizer = tokenizer
        self._num_aliases = 1 if config.answer_reduction == "first" else config.max_aliases
        self.scaffold = self._encode(config.scaffold)
        """What stands between a context and an answer."""

    def aliases(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of those of a question's `answers` that count, each once."""
        distinct = dict.fromkeys(tuple(self._encode(answer)) for answer in answers[: self._num_aliases])
        return [list(tokens) for tokens in distinct if tokens]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]
