"""The starts of an experiment, in its folder: config.N.yaml and env.N.txt of the N-th, config.yaml of the last.

Each start is compared with the previous start. A change is refused unless this start accepts it; changes of free
settings are only reported.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from a2tgpo.config.load import dump_config
from a2tgpo.config.run import RunConfig
from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.errors import ConfigError
from a2tgpo.run.environment import describe_environment, environment_changes, parse_environment
from a2tgpo.run.rules import Changes, Rules, changes_since, describe_changes

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
ACCEPT = "--accept-changes"
_STARTED = re.compile(r"env\.(\d+)\.txt")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a start differs from the one before it."""

    refused: Changes = field(default_factory=dict)
    """Changes that make it another experiment."""
    reported: Changes = field(default_factory=dict)
    """Changes that are allowed and only logged."""


def number_of_starts(folder: Path) -> int:
    """Return the number of starts recorded in `folder`."""
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return max((int(match[1]) for name in names if (match := _STARTED.fullmatch(name))), default=0)


def difference(folder: Path, config: RunConfig, rules: Rules) -> Difference:
    """Return how a start with `config` would differ from the last start in `folder`.

    Raises:
        ConfigError: one line; the last start's record cannot be read.
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
    now = parse_environment(describe_environment())
    refused, reported = environment_changes(before, now) if before else ({}, {})
    for key, pair in settings.items():
        (reported if rules.is_free(key, config) else refused)[key] = pair
    return Difference(refused=refused, reported=reported)


def require_same(folder: Path, config: RunConfig, rules: Rules, *, accept: bool, done: str) -> None:
    """Compare a start's `config` with the last start and report the changes; one process calls this.

    Args:
        accept: continue despite all changes.
        done: the experiment's progress, in a few words.

    Raises:
        ConfigError: one line; a change makes it another experiment, and `accept` is False.
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
    """Record what this start runs with; call in the process that holds the folder."""
    number = number_of_starts(folder) + 1
    text = dump_config(config)
    write_text(folder / f"config.{number}.yaml", text)
    write_text(folder / f"env.{number}.txt", describe_environment())
    write_text(folder / CONFIG_FILE, text)


def describe_owner(folder: Path) -> str:
    """Return who began the experiment in `folder`, when, and in which job, in a few words."""
    first = _environment(folder, 1)
    if not first:
        return "another run's folder"
    job = f" (Slurm job {first['job']})" if first.get("job", "none") != "none" else ""
    return f"a run that {first.get('user', 'somebody')} started on {first.get('date', '')[:10]}{job}"


def _last_environment(folder: Path) -> dict[str, str]:
    return _environment(folder, number_of_starts(folder))


def _environment(folder: Path, number: int) -> dict[str, str]:
    """Return the environment of start `number`; empty if unknown."""
    try:
        return parse_environment((folder / f"env.{number}.txt").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
