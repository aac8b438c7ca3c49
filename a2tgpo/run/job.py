"""Keep a scheduler's job on the configuration of its first start, even if its files change."""

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
    """Load a job's configuration: from `path` and `overrides` at its first start, afterwards from `kept`.

    `section.field=value` after the last file among `overrides` applies at every start: a scheduler passes the same
    arguments each time, but the job itself adds changing ones, such as its retrieval server's address.

    Args:
        kept: written by `keep`; None or missing: a first start.
        is_reporter: this process logs how the files have changed since.

    Raises:
        ConfigError: one line; as `load_config`.
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
    """Record what the job was started with, unless recorded already; one process calls this."""
    if not kept.exists():
        write_text(kept, dump_config(config))


def _describe_file_changes(config: RunConfig, path: str, overrides: Sequence[str]) -> str:
    """Return a clause on how the job's files have changed since its first start, which the job ignores."""
    try:
        live = load_config(path, overrides)
    except ConfigError as error:
        return f"; its configuration files can no longer be loaded: {error}"
    differing = changes(flat_config(config), flat_config(live))
    if not differing:
        return ""
    return f"; later changes of {path} are ignored: {describe_changes(differing)}"
