"""Collect the settings that determine an evaluation's answers. A resumed evaluation must have the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from a2tgpo.config.load import flat_config
from a2tgpo.config.run import RunConfig
from a2tgpo.config.user_files import PREFIX, file_digests
from a2tgpo.data.question_set import Question
from a2tgpo.io.user_code import is_user_code

_DECIDING = (
    "calculator.decimals",
    "calculator.max_digits",
    "data.chat_template_kwargs",
    "data.instructions",
    "data.max_prompt_tokens",
    "model.dtype",
    "reward.format_gate",
    "reward.names",
    "reward.weights",
    "rollout.call_format",
    "rollout.dtype",
    "rollout.max_calls_per_turn",
    "rollout.max_response_tokens",
    "rollout.max_turn_tokens",
    "rollout.max_turns",
    "rollout.protocol",
    "rollout.quantization",
    "rollout.strict_format",
    "rollout.temperature",
    "rollout.top_p",
    "run.seed",
    "search.backend",
    "search.corpus",
    "search.top_k",
    "tools.max_part_tokens",
    "tools.names",
)
"""Keys of the settings that determine the answers. A resumed evaluation may have another layout and another
`search.url`, because these are not listed."""
_OF_METHOD = f"{PREFIX}algorithm."
"""Prefix of the names under which the digests of files are recorded that only training uses."""
_OF_JUDGE = ("judge.max_tokens", "judge.model", "judge.pattern", "judge.scores")
_OF_TOOLS = {
    "mcp": ("mcp.command", "mcp.stateful", "mcp.tool"),
    "python": (
        *("python.max_output_chars", "python.memory_mib", "python.packages"),
        *("python.stateful", "python.timeout_s"),
    ),
    "visit": ("visit.allow_private", "visit.max_bytes", "visit.max_chars", "web.backend", "web.cassette"),
    "web_search": ("web.backend", "web.cassette", "web.top_k"),
}
"""Further keys for each tool. They have an effect only if `tools.names` has the tool."""


def evaluation_settings(
    config: RunConfig, weights: str, sets: Mapping[str, Sequence[Question]]
) -> dict[str, Any]:
    """Return the settings that determine an evaluation's answers, as JSON values by name.

    Args:
        weights: the identity of the model's weights (`SavedModel.identity`).
        sets: the questions of each data set.
    """
    flat = flat_config(config)
    names = (*config.reward.names, *config.tools.names)
    reads_records = "judge" in names or any(map(is_user_code, names))
    questions = {
        f"questions of {name}": _fingerprint(members, with_records=reads_records)
        for name, members in sets.items()
    }
    keys = _DECIDING + (_OF_JUDGE if "judge" in config.reward.names else ())
    keys += tuple(key for tool in config.tools.names for key in _OF_TOOLS.get(tool, ()))
    decided = {key: flat[key] for key in keys}
    files = {name: digest for name, digest in file_digests(config).items() if not name.startswith(_OF_METHOD)}
    return {"weights": weights, **questions, **decided, **files}


def _fingerprint(questions: Sequence[Question], *, with_records: bool) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for question in questions:
        content = [question.id, question.question, question.answers, question.hops]
        content += [question.record] if with_records else []
        digest.update(json.dumps(content).encode())
    return f"{len(questions)} ({digest.hexdigest()})"
