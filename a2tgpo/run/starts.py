"""Record each start of an experiment in its folder, and compare each start with the start before it.

The program reports changes of free settings. It refuses other changes unless the user accepts them.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from a2tgpo.config.load import dump_config
from a2tgpo.config.run import RunConfig
from a2tgpo.config.user_files import file_digests
from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.errors import ConfigError
from a2tgpo.run.environment import describe_environment, environment_changes, parse_environment
from a2tgpo.run.plugins import keep_files
from a2tgpo.run.rules import Changes, Rules, changes_since, describe_changes

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
ACCEPT = "--accept-changes"
_STARTED = re.compile(r"env\.(\d+)\.txt")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The changes from the last start to this start."""

    refused: Changes = field(default_factory=dict)
    """Changes that would make the run another experiment, so the program refuses them."""
    reported: Changes = field(default_factory=dict)
    """Changes that are allowed, so the program only logs them."""


def number_of_starts(folder: Path) -> int:
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return max((int(match[1]) for name in names if (match := _STARTED.fullmatch(name))), default=0)


def difference(folder: Path, config: RunConfig, rules: Rules) -> Difference:
    """Return the changes from the last start in `folder` to a start with `config`.

    Raises:
        ConfigError: with a one-line message, if the record of the last start cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        settings = changes_since(path.read_text(encoding="utf-8"), config, rules)
    except FileNotFoundError:
        return Difference()
    except (OSError, ValueError, yaml.YAMLError):
        raise ConfigError(
            f"{path}: not a readable configuration; replace it by {folder}/config.N.yaml of the last start"
        ) from None
    before = _last_environment(folder)
    now = parse_environment(describe_environment(file_digests(config)))
    refused, reported = environment_changes(before, now) if before else ({}, {})
    for key, pair in settings.items():
        (reported if rules.is_free(key, config) else refused)[key] = pair
    return Difference(refused=refused, reported=reported)


def require_same(folder: Path, config: RunConfig, rules: Rules, *, accept: bool, done: str) -> None:
    """Compare this start with the last start in `folder`, and report the changes; one process calls this.

    Args:
        accept: whether to continue despite changes that the program would otherwise refuse.
        done: the progress of the experiment, in a few words.

    Raises:
        ConfigError: with a one-line message, if a change would make the run another experiment and `accept` is False.
    """
    found = difference(folder, config, rules)
    if found.refused and not accept:
        raise ConfigError(
            f"run.name: {folder} is {describe_owner(folder)}, {done}; this start differs from the last one: "
            f"{describe_changes(found.refused)}. Choose another run.name for a new experiment; {ACCEPT} continues "
            "with the changes; --resume none sets the folder aside and starts over"
        )
    if changed := found.refused | found.reported:
        logger.warning("the run continues with changes since its last start: %s", describe_changes(changed))


def record_start(folder: Path, config: RunConfig) -> None:
    """Record the configuration and the environment of this start; the process that holds the folder calls this."""
    number = number_of_starts(folder) + 1
    text = dump_config(config)
    write_text(folder / f"config.{number}.yaml", text)
    write_text(folder / f"env.{number}.txt", describe_environment(file_digests(config)))
    keep_files(folder, config)
    write_text(folder / CONFIG_FILE, text)


def describe_owner(folder: Path) -> str:
    """Return a few words that tell who began the experiment in `folder`, when, and in which job."""
    first = _environment(folder, 1)
    if not first:
        return "another run's folder"
    job = f" (Slurm job {first['job']})" if first.get("job", "none") != "none" else ""
    return f"a run that {first.get('user', 'somebody')} started on {first.get('date', '')[:10]}{job}"


def _last_environment(folder: Path) -> dict[str, str]:
    return _environment(folder, number_of_starts(folder))


def _environment(folder: Path, number: int) -> dict[str, str]:
    """Return the environment of start `number`, or an empty map if no file records it."""
    try:
        return parse_environment((folder / f"env.{number}.txt").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
