"""Question files and the prompt."""

import math
from dataclasses import dataclass, field

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import require

SEARCH_INSTRUCTIONS = (
    "Answer the question. Think inside <think> and </think>. When you lack a fact, call the search engine with "
    "<search> query </search>; its passages come back between <result> and </result>. You may search "
    "several times. When you know the answer, write it as <answer> \\boxed{answer} </answer>."
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Question files and the prompt."""

    train: Expanded
    """JSONL or Parquet file of questions and answers, compressed or not; docs/data.md lists the fields."""
    test: Expanded
    """Held-out questions for evaluation, in the same format."""
    instructions: str = SEARCH_INSTRUCTIONS
    """System message before the question; empty: none."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """Variables for the tokenizer's chat template, such as {enable_thinking: false}."""
    max_prompt_tokens: int = 2000
    """Longest prompt, tokens (paper: 2000); a start refuses longer ones."""

    def __post_init__(self) -> None:
        require(self.max_prompt_tokens >= 1, "data.max_prompt_tokens", self.max_prompt_tokens, ">= 1")
        require(
            all(_is_variable(name, value) for name, value in self.chat_template_kwargs.items()),
            "data.chat_template_kwargs",
            self.chat_template_kwargs,
            "names of template variables, each with a text, a number, true or false",
        )


def _is_variable(name: object, value: object) -> bool:
    is_plain = isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(name, str) and name.isidentifier() and is_plain
