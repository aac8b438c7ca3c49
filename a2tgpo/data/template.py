"""Putting a question to the model: the chat template, and prompts that fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from a2tgpo.config.check import ConfigError
from a2tgpo.data.question_set import Question
from a2tgpo.trajectory import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptTemplate:
    """Renders a question through the tokenizer's chat template, generation header included.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        instructions: the system message; empty: the question alone.

    Raises:
        ConfigError: if the tokenizer has no chat template or the template refuses the messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, instructions: str):
        self.tokenizer = tokenizer
        self.instructions = instructions
        if not tokenizer.chat_template:
            raise ConfigError(
                f"model.path: the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use an instruct model, or put a chat_template into its tokenizer_config.json"
            )
        self.render("?")

    def render(self, question: str) -> tuple[int, ...]:
        """Token ids of the prompt for `question`."""
        return self.render_many([question])[0]

    def render_many(self, questions: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of the prompt for each of `questions`, in order."""
        conversations = [self._messages(question) for question in questions]
        if not conversations:
            return []
        try:
            texts = self.tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            # Templates are code of the model's author; jinja2 passes on what they raise.
            raise ConfigError(
                f"model.path: the chat template of {self.tokenizer.name_or_path} refuses "
                f"{'a system message and ' if self.instructions else ''}a user message ({error}); "
                "try data.instructions='' or another template"
            ) from None
        return [tuple(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _messages(self, question: str) -> list[dict[str, str]]:
        user = {"role": "user", "content": question}
        return [{"role": "system", "content": self.instructions}, user] if self.instructions else [user]


class PromptSet:
    """A question set rendered and tokenised once; prompts of a step are picked from it by index.

    Args:
        questions: the set.
        template: renders it.
        max_prompt_tokens: longest prompt allowed, tokens.

    Raises:
        ConfigError: naming the first question whose prompt is longer.
    """

    def __init__(self, questions: Sequence[Question], template: PromptTemplate, *, max_prompt_tokens: int):
        self.questions = list(questions)
        self._tokens = template.render_many([question.question for question in questions])
        for question, tokens in zip(self.questions, self._tokens, strict=True):
            if len(tokens) > max_prompt_tokens:
                raise ConfigError(
                    f"the prompt of question {question.id!r} has {len(tokens)} tokens; allowed: at most "
                    f"data.max_prompt_tokens={max_prompt_tokens}; raise that, or take the question out"
                )

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def fingerprint(self) -> str:
        """Names the questions: equal for the same ids and texts in the same order."""
        digest = hashlib.blake2b(digest_size=16)
        for question in self.questions:
            digest.update(json.dumps([question.id, question.question]).encode())
        return digest.hexdigest()

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """Prompts of the questions at `indices`; their `index` is the position in this list."""
        return [
            Prompt(
                index=position,
                id=self.questions[index].id,
                question=self.questions[index].question,
                answers=self.questions[index].answers,
                tokens=self._tokens[index],
                hops=self.questions[index].hops,
            )
            for position, index in enumerate(indices)
        ]
