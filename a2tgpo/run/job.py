"""Keep a scheduler's job on the configuration of its first start, even if the configuration files change later."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from a2tgpo.config.load import dump_config, flat_config, is_file, load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.errors import ConfigError
from a2tgpo.run.rules import changes, describe_changes

logger = logging.getLogger(__name__)


def load_as_started(
    kept: Path | None, path: str, overrides: Sequence[str], *, is_reporter: bool
) -> RunConfig:
    """Return the configuration of a job.

    The first start loads `path` and `overrides`, and each later start loads `kept`. The `section.field=value`
    overrides after the last file in `overrides` apply at every start, because their values may change from start to
    start. An example is the address of the job's retrieval server.

    Args:
        kept: the file that `keep` writes. If `kept` is None or the file does not exist, this start is the first.
        is_reporter: whether this process logs how the files have changed since the first start.

    Raises:
        ConfigError: for the same reasons as `load_config`.
    """
    if kept is None or not kept.exists():
        return load_config(path, overrides)
    files = [place for place, override in enumerate(overrides) if is_file(override)]
    behind = overrides[files[-1] + 1 if files else 0 :]
    config = load_config(kept, behind)
    if is_reporter:
        logger.warning(
            "the job continues with the configuration of its first start (%s)%s",
            kept,
            _describe_file_changes(config, path, overrides),
        )
    return config


def keep(kept: Path, config: RunConfig) -> None:
    """Write the configuration of the job's first start to `kept`, unless the file exists; one process calls this."""
    if not kept.exists():
        write_text(kept, dump_config(config))


def _describe_file_changes(config: RunConfig, path: str, overrides: Sequence[str]) -> str:
    """Return a clause that tells how the configuration files have changed since the first start, or ""."""
    try:
        live = load_config(path, overrides)
    except ConfigError as error:
        return f"; its configuration files can no longer be loaded: {error}"
    differing = changes(flat_config(config), flat_config(live))
    if not differing:
        return ""
    return f"; later changes of {path} are ignored: {describe_changes(differing)}"
