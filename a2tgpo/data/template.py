"""Render questions through the model's chat template, and check that the prompts are not too long."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from a2tgpo.config.run import RunConfig
from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.data.question_set import Question
from a2tgpo.data.thought import THINK_TAG
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.trajectory import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE, _ANSWER = "Which river flows through Vienna?", "The Danube."
KWARGS_KEY = "data.chat_template_kwargs"
CHUNK = 512
"""Largest number of questions in one call of the tokenizer. A call needs about 20 kB of memory per question."""


class PromptTemplate:
    """Render a question through the tokenizer's chat template. The prompt ends with the generation header.

    Args:
        instructions: the system message. If it is empty, the prompt has no system message.
        kwargs: values for other variables of the template, such as enable_thinking.
        date: the date that the template's `strftime_now` returns. None means today's date in UTC.
        tools: descriptions of the tools that the template must write into the prompt.

    Raises:
        ConfigError: with a one-line message, if the tokenizer has no chat template, or if the template cannot write a
            message, a tool or the generation header, or does not use one of `kwargs`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instructions: str,
        *,
        kwargs: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ):
        self.tokenizer = tokenizer
        self._tools = [dict(tool) for tool in tools]
        self.instructions = instructions
        self._literal = LiteralEncoder(tokenizer)
        self.date = date or today()
        self._kwargs = dict(kwargs or {})
        if not tokenizer.chat_template:
            raise ConfigError(
                f"model.path: the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use an instruct model, or name a file with a template in data.chat_template"
            )
        self._check_names()
        self._check_kwargs()
        (prompt,) = self._texts([_PROBE])
        self._check_prompt(prompt)
        self.opening_tags = "".join(THINK_TAG.findall(prompt.rpartition(_PROBE)[2]))
        """The think tags after the question: <think> if the template opens a thought, <think></think> if thinking is
        switched off, and otherwise an empty text."""
        self.end_of_turn = self._find_end_of_turn()
        """Id of the control token with which the template ends an answer, or None if the template uses the
        tokenizer's end-of-sequence token or no control token. For example, the template of a base model may write
        <|im_end|>, while the model ends a sequence with <|endoftext|>."""

    def render(self, question: str) -> tuple[int, ...]:
        """Return the token ids of the prompt for `question`."""
        return self.render_many([question])[0]

    def render_many(self, questions: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the token ids of each question's prompt. No part of a question becomes a control token."""
        encoded = self._literal.encode_framed(questions, self._texts, begins_sequence=True)
        return [tuple(ids) for ids in encoded]

    def conversation(self, messages: Sequence[Mapping[str, Any]], *, has_header: bool) -> str:
        """Return the text of a conversation.

        Args:
            messages: the messages after the system message.
            has_header: whether the text ends with the generation header.

        Raises:
            ConfigError: with a one-line message, if the template refuses the conversation.
        """
        whole = [*self._messages("")[:-1], *map(dict, messages)]
        return self._apply([whole], has_header=has_header)[0]

    def _texts(self, questions: Sequence[str]) -> list[str]:
        return self._apply([self._messages(question) for question in questions])

    def _messages(self, question: str) -> list[dict[str, str]]:
        user = {"role": "user", "content": question}
        return [{"role": "system", "content": self.instructions}, user] if self.instructions else [user]

    def _apply(self, conversations: list[list[dict[str, Any]]], *, has_header: bool = True) -> list[str]:
        if not conversations:
            return []
        try:
            texts: Any = self.tokenizer.apply_chat_template(
                conversations,
                add_generation_prompt=has_header,
                tokenize=False,
                # transformers' own `strftime_now` reads the clock, so two processes, or two starts of a run, could
                # get different dates.
                strftime_now=self.date.strftime,
                tools=self._tools or None,  # type: ignore[arg-type]  # transformers' annotation lacks plain dicts
                **self._kwargs,
            )
        except Exception as error:
            # A template is code of the model's author and may raise any exception.
            raise ConfigError(
                f"model.path: the chat template of {self.tokenizer.name_or_path} refuses "
                f"{'a system message and ' if self.instructions else ''}a user message ({error}); "
                "try data.instructions='' or another template"
            ) from None
        return texts

    def _check_names(self) -> None:
        """Raise `ConfigError` if the tokenizer has several templates, but none named `default`."""
        templates = self.tokenizer.chat_template
        if isinstance(templates, dict) and "default" not in templates:
            raise ConfigError(
                f"model.path: the tokenizer of {self.tokenizer.name_or_path} has chat templates named "
                f"{', '.join(sorted(templates))}, but none named default; copy the intended one to a "
                "file, and name the file in data.chat_template"
            )

    def _check_kwargs(self) -> None:
        source = self.tokenizer.get_chat_template()
        taken = {
            *inspect.signature(self.tokenizer.apply_chat_template).parameters,
            "messages",
            "strftime_now",
        }
        for name in self._kwargs:
            require(
                name not in taken,
                f"{KWARGS_KEY}.{name}",
                self._kwargs[name],
                "a name that the program does not use",
            )
            require(
                re.search(rf"\b{re.escape(name)}\b", source) is not None,
                f"{KWARGS_KEY}.{name}",
                self._kwargs[name],
                f"a variable of the chat template of {self.tokenizer.name_or_path}, which does not use this name",
            )

    def _check_prompt(self, prompt: str) -> None:
        """Raise `ConfigError` if the prompt lacks a message or the generation header.

        A template that was written for another purpose silently skips messages whose role it does not know.
        """
        name = self.tokenizer.name_or_path
        for key, content, mend in (
            (
                "data.instructions",
                self.instructions,
                "set data.instructions='' and teach the format in a warm start",
            ),
            ("the question", _PROBE, "use another"),
        ):
            if _squeezed(content) not in _squeezed(prompt):
                raise ConfigError(f"model.path: the chat template of {name} ignores {key}; {mend}")
        names = [str(tool["function"]["name"]) for tool in self._tools]
        if missing := [tool for tool in names if tool not in prompt.rpartition(_PROBE)[0]]:
            raise ConfigError(
                f"model.path: the chat template of {name} ignores the tool {missing[0]}; use a template that writes "
                "tools into the prompt, or rollout.protocol=tags"
            )
        if not self._has_header(prompt):
            raise ConfigError(
                f"model.path: the chat template of {name} has no generation header (add_generation_prompt): the "
                "model would have to write it; add one to its tokenizer_config.json"
            )

    def _has_header(self, prompt: str) -> bool:
        """Return whether the model's answer can directly follow the prompt.

        This is true if the template adds a generation header, or if a conversation with an answer has only think tags
        between the prompt and the answer.
        """
        if self._apply([self._messages(_PROBE)], has_header=False) != [prompt]:
            return True
        whole = self._answered()
        between = whole.removeprefix(prompt).partition(_ANSWER)[0]
        return not whole.startswith(prompt) or not THINK_TAG.sub("", between).strip()

    def _find_end_of_turn(self) -> int | None:
        following = self._answered().partition(_ANSWER)[2].lstrip()
        for number, token in self.tokenizer.added_tokens_decoder.items():
            if token.special and following.startswith(str(token)):
                return number if number != self.tokenizer.eos_token_id else None
        return None

    def _answered(self) -> str:
        """Return a rendered conversation that ends with an answer, or "" if the template refuses answers."""
        messages = [*self._messages(_PROBE), {"role": "assistant", "content": _ANSWER}]
        try:
            (whole,) = self._apply([messages], has_header=False)
        except ConfigError:
            return ""
        return whole


def today() -> datetime.date:
    """Return today's date in UTC."""
    return datetime.datetime.now(datetime.UTC).date()


def _squeezed(text: str) -> str:
    return " ".join(text.split())


class PromptSet:
    """A question set whose prompts are rendered and tokenised on demand.

    Args:
        max_prompt_tokens: largest number of tokens that a prompt may have.
        suffix: text that follows each question in its prompt.
        suffix_key: name of the setting that `suffix` comes from. Error messages name it.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        template: PromptTemplate,
        *,
        max_prompt_tokens: int,
        suffix: str = "",
        suffix_key: str = "",
    ):
        self.questions = list(questions)
        self._template = template
        self._max_prompt_tokens = max_prompt_tokens
        self._suffix, self._suffix_key = suffix, suffix_key

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest that is equal for sets with the same ids and question texts in the same order."""
        digest = hashlib.blake2b(digest_size=16)
        for question in self.questions:
            digest.update(json.dumps([question.id, question.question]).encode())
        return digest.hexdigest()

    @property
    def content_fingerprint(self) -> str:
        """Hexadecimal digest that also depends on the answers and on the records, which rewards and tools read."""
        digest = hashlib.blake2b(digest_size=16)
        for question in self.questions:
            digest.update(
                json.dumps([question.id, question.question, question.answers, question.record]).encode()
            )
        return digest.hexdigest()

    def first_too_long(self, share: slice = slice(None)) -> tuple[int, str] | None:
        """Return (index, error message) for the first question in `share` whose prompt is too long, or None."""
        indices = range(len(self))[share]
        for first in range(0, len(indices), CHUNK):
            chunk = indices[first : first + CHUNK]
            for index, tokens in zip(chunk, self._render(chunk), strict=True):
                if len(tokens) > self._max_prompt_tokens:
                    with_suffix = f" with {self._suffix_key}" if self._suffix else ""
                    return index, (
                        f"the prompt of question {self.questions[index].id!r}{with_suffix} has {len(tokens)} tokens; "
                        f"allowed: at most data.max_prompt_tokens={self._max_prompt_tokens}; raise that, or remove "
                        "the question"
                    )
        return None

    def check_lengths(self) -> None:
        """Raise ConfigError if a question's prompt is too long. The message names the first such question."""
        if (fault := self.first_too_long()) is not None:
            raise ConfigError(fault[1])

    def prompts(self, indices: Sequence[int], positions: Sequence[int] | None = None) -> list[Prompt]:
        """Return the prompts of the questions at `indices`, or only of those at `positions` in `indices`.

        A prompt's `index` is its question's position in `indices`.
        """
        positions = range(len(indices)) if positions is None else positions
        rendered = self._render([indices[position] for position in positions])
        return [
            self._prompt(position, self.questions[indices[position]], tokens)
            for position, tokens in zip(positions, rendered, strict=True)
        ]

    def tokens_of(self, ids: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the token ids of the prompts of the questions with these ids, by id."""
        distinct = list(dict.fromkeys(ids))
        return dict(zip(distinct, self._render([self._index[id] for id in distinct]), strict=True))

    @cached_property
    def _index(self) -> dict[str, int]:
        """The index of each question, by its id."""
        return {question.id: index for index, question in enumerate(self.questions)}

    def _render(self, indices: Sequence[int]) -> list[tuple[int, ...]]:
        return self._template.render_many(
            [self.questions[index].question + self._suffix for index in indices]
        )

    def _prompt(self, position: int, question: Question, tokens: tuple[int, ...]) -> Prompt:
        return Prompt(
            index=position,
            id=question.id,
            question=question.question,
            answers=question.answers,
            tokens=tokens,
            hops=question.hops,
            record=question.record,
        )


def contrast_prompt_set(
    questions: Sequence[Question], template: PromptTemplate, config: RunConfig
) -> PromptSet:
    """Return the contrast prompts of `questions` (`algorithm.contrast`)."""
    return PromptSet(
        questions,
        template,
        max_prompt_tokens=config.data.max_prompt_tokens,
        suffix=config.algorithm.contrast.prompt_suffix,
        suffix_key="algorithm.contrast.prompt_suffix",
    )
