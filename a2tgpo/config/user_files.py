"""The user's files whose content determines what a run computes."""

from __future__ import annotations

from pathlib import Path

from a2tgpo.config.run import RunConfig
from a2tgpo.io.user_code import digest, is_user_code

PREFIX = "file:"
MISSING = "missing"


def user_files(config: RunConfig) -> dict[str, str]:
    """Return the path of each file, by the setting that names the file."""
    lists = {"reward.names": config.reward.names, "tools.names": config.tools.names}
    specs = {f"{key}[{place}]": spec for key, names in lists.items() for place, spec in enumerate(names)}
    specs |= {part.key: spec for part, spec in config.algorithm.parts}
    files = {key: spec.rpartition(":")[0] for key, spec in specs.items() if is_user_code(spec)}
    if config.data.chat_template:
        files["data.chat_template"] = config.data.chat_template
    if "judge" in config.reward.names and config.judge.prompt_file:
        files["judge.prompt_file"] = config.judge.prompt_file
    return files


def file_digests(config: RunConfig) -> dict[str, str]:
    """Map the `digest_name` of each file to the file's digest, or to `MISSING`."""
    return {digest_name(key, path): _digest(path) for key, path in user_files(config).items()}


def digest_name(key: str, path: str) -> str:
    """Return the name of a file's digest in records and messages: one word with the setting and the file's name."""
    return f"{PREFIX}{key}={'_'.join(Path(path).name.split())}"


def _digest(path: str) -> str:
    try:
        return digest(Path(path).expanduser())
    except OSError:
        return MISSING
