"""Build the protocol of a run."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from a2tgpo.config.rollout import GainConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.data.template import PromptTemplate
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.text_file import read_text
from a2tgpo.protocol.chat import ChatProtocol
from a2tgpo.protocol.protocol import AgentProtocol
from a2tgpo.protocol.tags import TagProtocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_protocol(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    schemas: Sequence[Mapping[str, Any]],
    date: datetime.date | None,
) -> AgentProtocol:
    """Build the protocol of `config`. If `data.chat_template` is set, the tokenizer gets the template in this file.

    Args:
        schemas: descriptions of the tools (`Toolset.schemas`).
        date: the date that the prompts give as the current date. None means today in UTC.

    Raises:
        ConfigError: with a one-line message, if the tokenizer's chat template does not suit the protocol.
    """
    file = config.data.chat_template
    if not file:
        return _build(config, tokenizer, schemas=schemas, date=date)
    tokenizer.chat_template = read_text(file, key="data.chat_template")
    try:
        return _build(config, tokenizer, schemas=schemas, date=date)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", f"data.chat_template {file}", 1)) from None


def _build(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    schemas: Sequence[Mapping[str, Any]],
    date: datetime.date | None,
) -> AgentProtocol:
    rollout = config.rollout
    template = PromptTemplate(
        tokenizer,
        config.instructions,
        kwargs=config.data.chat_template_kwargs,
        date=date,
        tools=schemas if rollout.describes_tools else (),
    )
    scaffold, max_part_tokens = rollout.gain.scaffold, config.tools.max_part_tokens
    if rollout.protocol == "chat":
        return ChatProtocol(
            template,
            schemas=schemas,
            call_format=rollout.call_format,
            max_calls=rollout.max_calls_per_turn,
            scaffold="" if scaffold == GainConfig().scaffold else scaffold,
            is_strict=rollout.strict_format,
            max_part_tokens=max_part_tokens,
        )
    names = [str(schema["function"]["name"]) for schema in schemas]
    return TagProtocol(
        template,
        tools=names,
        multiline=[name for name, schema in zip(names, schemas, strict=True) if _takes_lines(schema)],
        scaffold=scaffold,
        max_part_tokens=max_part_tokens,
    )


def _takes_lines(schema: Mapping[str, Any]) -> bool:
    """Return whether a parameter of the tool is code or another text whose line breaks and indents matter."""
    properties = schema["function"].get("parameters", {}).get("properties", {})
    return any("contentMediaType" in parameter for parameter in properties.values())
