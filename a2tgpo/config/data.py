"""Settings of the question files and of the prompt."""

import math
from dataclasses import dataclass, field

from a2tgpo.config.expand import Expanded, ExpandedOrNumbers
from a2tgpo.io.errors import require

SEARCH_INSTRUCTIONS = (
    "Answer the question. Think inside <think> and </think>. When you lack a fact, call the search engine with "
    "<search> query </search>; its passages come back between <result> and </result>. You may search "
    "several times. When you know the answer, write it as <answer> \\boxed{answer} </answer>."
)


CHAT_INSTRUCTIONS = (
    "Answer the question. When you lack a fact, call a tool; you may call tools several times. When you know the "
    "answer, write it as \\boxed{answer}."
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The question files, and the parts of the prompt."""

    train: ExpandedOrNumbers
    """JSONL or Parquet file of training questions; it may be compressed (docs/data.md). To mix several files, map
    each file to its weight. With {nq.jsonl: 1, hotpotqa.parquet: 3}, for example, three of four questions are from
    the second file."""
    test: Expanded = ""
    """File of questions for evaluation, in the format of `train`. It is not read if `evaluation.sets` names files."""
    instructions: str = SEARCH_INSTRUCTIONS
    """System message. Empty: no system message. With rollout.protocol=chat, the default is another text, which names
    no tags."""
    chat_template: Expanded = ""
    """File with a chat template (Jinja) that replaces the tokenizer's template, for example for a base model without
    a template. Empty: the tokenizer's template."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """Variables for the chat template, for example {enable_thinking: false}."""
    max_prompt_tokens: int = 2000
    """Maximum number of tokens in a prompt (paper: 2000). The run does not start if a prompt is longer."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.train, str)
            or (len(self.train) > 0 and all(_is_file(*item) for item in self.train.items())),
            "data.train",
            self.train,
            "a file, or a mapping of each file to a number > 0",
        )
        require(self.max_prompt_tokens >= 1, "data.max_prompt_tokens", self.max_prompt_tokens, ">= 1")
        require(
            all(_is_variable(name, value) for name, value in self.chat_template_kwargs.items()),
            "data.chat_template_kwargs",
            self.chat_template_kwargs,
            "names of template variables, each with a text, a number, true or false",
        )

    @property
    def train_files(self) -> dict[str, float]:
        """Map each training file to its weight. If there is only one file, its weight is 1."""
        return dict(self.train) if isinstance(self.train, dict) else {self.train: 1.0}


def _is_file(name: object, value: object) -> bool:
    if not isinstance(name, str) or not name:
        return False
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf  # type: ignore[operator]  # mypy does not follow `is_number`


def _is_variable(name: object, value: object) -> bool:
    is_plain = isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(name, str) and name.isidentifier() and is_plain
