"""Check whether a chat template always renders the turns of a growing conversation in the same way."""

from __future__ import annotations

import itertools

from a2tgpo.data.template import PromptTemplate
from a2tgpo.protocol.frames import ARGUMENT, QUESTION, call_message, result_messages

_THOUGHT = "<think>\nTHOUGHT7\n</think>\n\n"
_SHOWN = 40
"""Number of characters of each text that a message shows."""


def template_difference(template: PromptTemplate, probe: tuple[str, str], *, thinks: bool) -> str | None:
    """Return how the template changes an earlier turn as the conversation grows, or None if no turn changes.

    The rollout is consistent even if turns change, because it renders no turn twice.

    Args:
        probe: the name of a tool, and the name of one of the tool's parameters.
        thinks: whether the policy's turns have thoughts.
    """
    tool, argument = probe
    thought = _THOUGHT if thinks else ""
    messages = [
        {"role": "user", "content": QUESTION},
        call_message([(tool, {argument: ARGUMENT})], content=thought),
        *result_messages([(tool, "RESULT7")]),
        {"role": "assistant", "content": f"{thought}It is the Danube."},
    ]
    contexts = [
        template.conversation(messages[:1], has_header=True),
        template.conversation(messages[:3], has_header=True),
        template.conversation(messages, has_header=False),
    ]
    for before, after in itertools.pairwise(contexts):
        if not after.startswith(before):
            equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
            begin = max(0, sum(1 for _ in equal) - 10)
            shown = (text[begin : begin + _SHOWN] for text in (before, after))
            return " becomes ".join(map(repr, shown))
    return None
