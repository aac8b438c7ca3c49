"""The file that describes an exported agent. The file is in the folder of the agent's weights."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from a2tgpo.config.expand import escape
from a2tgpo.config.load import dump_config
from a2tgpo.config.run import RunConfig
from a2tgpo.io.atomic_file import write_json
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.user_code import is_user_code

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
_VARIABLE = re.compile(r"(?<!\$)\$(?:\$\$)*(?!\$)")
"""A $ that begins the name of an environment variable. `write_agent_file` doubles every other $."""


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


def require_harmless(path: Path, config: RunConfig, *, overridden: Collection[str]) -> None:
    """Raise `ConfigError` if the agent file `path` names code to run or secrets to send, or allows private addresses.

    A stranger may have written the agent file in a model's folder. So a program calls this if the user named only the
    folder, and not the file itself.

    Args:
        config: the configuration in `path`, with overrides.
        overridden: the keys of the settings that the user gave (`overridden_keys`).
    """
    found = {
        "tools.names": [name for name in config.tools.names if is_user_code(name)],
        "mcp.command": list(config.mcp.command) if "mcp" in config.tools.names else [],
        "search.token_file": config.search.token_file,
        "web.token_file": config.web.token_file,
        "visit.allow_private": "visit" in config.tools.names and config.visit.allow_private,
    }
    harmful = [f"{key} is {value!r:.80}" for key, value in found.items() if value and key not in overridden]
    if _VARIABLE.search(path.read_text(encoding="utf-8")):
        harmful.append("it has environment variables")
    if harmful:
        raise ConfigError(
            f"{path} may run code, send secrets or reach private addresses ({'; '.join(harmful)}); read the file, "
            f"then name it: --config {path}"
        )
