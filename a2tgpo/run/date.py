"""Choose, once per run, the date that the chat template may write into the prompts."""

from __future__ import annotations

import datetime
from pathlib import Path

from a2tgpo.config.run import RunConfig
from a2tgpo.data.template import today
from a2tgpo.io.errors import ConfigError
from a2tgpo.parallel.collectives import broadcast_object, world_group
from a2tgpo.parallel.groups import ParallelGroups

FILE = "date.txt"


def run_date(config: RunConfig, groups: ParallelGroups) -> datetime.date:
    """Return the run's date, or today's date (UTC, rank 0's clock) for a new run; every rank must call this.

    Raises:
        ConfigError: on all ranks, if the run's file does not contain a date.
    """
    found: datetime.date | ConfigError | None = None
    if groups.rank == 0:
        try:
            found = read_date(Path(config.run.root) / config.run.name) or today()
        except ConfigError as error:
            found = error
    found = broadcast_object(found, world_group(), source=0)
    if isinstance(found, ConfigError):
        raise found
    assert found is not None
    return found


def read_date(folder: Path) -> datetime.date | None:
    """Return the date in the file of a run's `folder`, or None if the file does not exist yet.

    Raises:
        ConfigError: with a one-line message, if the file cannot be read or does not contain a date.
    """
    path = folder / FILE
    try:
        return datetime.date.fromisoformat(path.read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a date like 2026-01-31"
        raise ConfigError(
            f"{path}: cannot be read ({reason}); write the date of the run's first start"
        ) from None
