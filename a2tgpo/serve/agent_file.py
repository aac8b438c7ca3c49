"""Write the file that describes an exported agent. The file is in the folder of the agent's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from a2tgpo.config.expand import escape
from a2tgpo.config.load import dump_config
from a2tgpo.config.run import RunConfig
from a2tgpo.io.atomic_file import write_json

AGENT_FILE = "agent.json"
_WHOLE_SECTIONS = ("tools", "search", "calculator", "python", "web", "visit", "mcp")
_FIELDS = {
    "run": ("name", "seed"),
    "model": ("dtype",),
    "data": ("instructions", "chat_template_kwargs", "max_prompt_tokens"),
    "rollout": (
        "temperature",
        "top_p",
        "protocol",
        "call_format",
        "max_calls_per_turn",
        "strict_format",
        "max_turns",
        "max_turn_tokens",
        "max_response_tokens",
        "tensor_parallel",
        "max_concurrent",
        "kv_cache_gib",
        "dtype",
        "quantization",
    ),
    "parallel": ("timeout_s", "start_timeout_s"),
    "algorithm": ("correction",),
}


def write_agent_file(folder: Path, config: RunConfig) -> None:
    """Write `folder`/agent.json, a configuration that every program accepts.

    The file contains the instructions, the template variables, the tools with their settings, and the limits of a
    rollout. It contains no question files and no training settings. Its `model.path` is `folder`.

    Raises:
        OSError: with the name of the file, if the file cannot be written.
    """
    sections = yaml.safe_load(dump_config(config))
    kept: dict[str, Any] = {
        name: {field: sections[name][field] for field in fields} for name, fields in _FIELDS.items()
    }
    kept |= {name: sections[name] for name in _WHOLE_SECTIONS}
    kept["model"]["path"] = escape(str(folder))
    kept["data"] |= {"train": "", "test": ""}
    write_json(folder / AGENT_FILE, kept)
