"""Build the protocol of a run."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

from a2tgpo.config.run import RunConfig
from a2tgpo.data.template import PromptTemplate
from a2tgpo.protocol.protocol import AgentProtocol
from a2tgpo.protocol.tags import TagProtocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_protocol(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[str],
    date: datetime.date | None,
) -> AgentProtocol:
    """Build the protocol of `config`.

    Args:
        tools: names of the tools.
        date: the date that the prompts give as the current date. None means today in UTC.

    Raises:
        ConfigError: with a one-line message, if the tokenizer's chat template cannot render the prompts.
    """
    template = PromptTemplate(
        tokenizer, config.data.instructions, kwargs=config.data.chat_template_kwargs, date=date
    )
    return TagProtocol(
        template,
        tools=tools,
        scaffold=config.rollout.gain.scaffold,
        max_part_tokens=config.tools.max_part_tokens,
    )
