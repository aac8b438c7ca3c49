"""Choose the date that the chat template may write into a run's prompts. A run chooses the date once and keeps it in
a file of its folder.
"""

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
    """Return the date of the run; every rank must call this.

    If the run has no date yet, return today's date (UTC) by the clock of rank 0.

    Raises:
        ConfigError: the run's file does not contain a date; raised on all ranks.
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
    """Return the date that the `folder` of a run has in its file, or None if the file does not exist yet.

    Raises:
        ConfigError: one line; the file cannot be read, or it does not contain a date.
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
