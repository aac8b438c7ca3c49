"""Define which settings identify an experiment, and which settings may change from one start to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from a2tgpo.config.load import dump_config, flat_config, flat_value
from a2tgpo.config.renamed import RENAMED, with_new_names
from a2tgpo.config.run import RunConfig
from a2tgpo.config.user_files import file_digests

Changes = dict[str, tuple[Any, Any]]
"""Maps the key of each changed setting to its values (before, now)."""
PLACES = ("run.name", "run.root")
"""Settings that decide where the folder of a run is. These settings do not identify the experiment."""
MAX_SHOWN = 12
"""Largest number of changes that a message lists."""


@dataclass(frozen=True)
class Rules:
    """The rules by which a program compares its settings. A prefix that ends with a dot means a whole section."""

    used: tuple[str, ...]
    """Prefixes of the settings that the program uses and compares."""
    free: tuple[str, ...]
    """Prefixes of the settings that may change between two starts, because they do not change what is learned."""

    def is_used(self, key: str) -> bool:
        return key.startswith(self.used) and key not in PLACES

    def is_free(self, key: str, config: RunConfig) -> bool:
        """Return whether the setting `key` may change. run.steps must not change if a learning rate decay uses it."""
        if key == "run.steps":
            return config.update.lr_schedule == "constant"
        return key.startswith(self.free)


TRAINING = Rules(
    used=tuple(
        f"{section}."
        for section in (
            *("run", "model", "data", "tools", "search", "calculator", "python", "web", "visit", "mcp"),
            *("cluster", "parallel", "rollout", "reward", "judge", "algorithm", "update", "refit"),
            *("guard", "watchdog", "profile"),
            *("evaluation", "checkpoint"),
        )
    ),
    free=(
        *(
            "run.log_rollouts",
            "run.keep_rollouts_gb",
            "checkpoint.",
            "watchdog.",
            "profile.",
            "guard.",
            "cluster.",
            "refit.",
        ),
        *("evaluation.every", "evaluation.at_start", "parallel.timeout_s", "parallel.start_timeout_s"),
        *("search.url", "search.token_file", "search.request_timeout_s", "search.max_attempts"),
        *("search.break_after", "search.break_s", "search.max_shortfall"),
        *("web.token_file", "web.request_timeout_s", "web.max_attempts", "visit.timeout_s", "mcp.timeout_s"),
        *("judge.url", "judge.token_file", "judge.timeout_s", "judge.max_attempts", "judge.cache"),
        "judge.max_calls_per_step",
        *("reward.num_workers", "reward.timeout_s", "reward.max_failed_share"),
        *("tools.max_concurrent_calls", "tools.call_timeout_s", "tools.on_outage", "tools.outage_limit_s"),
    ),
)


WARM_START = Rules(
    used=(
        *("model.", "parallel.", "warmstart.", "run.seed", "run.deterministic"),
        "tools.names",
        *("data.instructions", "data.chat_template", "rollout.protocol", "rollout.call_format"),
        *("update.adam_", "update.clip_grad", "update.max_microbatch_tokens", "update.distributed_optimizer"),
    ),
    free=(
        *("parallel.timeout_s", "parallel.start_timeout_s"),
        *("warmstart.evaluate_every", "warmstart.checkpoint_every"),
    ),
)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint records of `config`: the value of each dotted key, and the digests of files."""
    settings = {key: value for key, value in flat_config(config).items() if key not in PLACES}
    return settings | file_digests(config)


def written_settings(text: str, keys: Iterable[str]) -> dict[str, Any]:
    """Return the values of `keys` in `text`, by key. Keys that are missing in `text` are left out.

    Args:
        text: a configuration that `dump_config` wrote, in this version or an earlier one.

    Raises:
        yaml.YAMLError: if `text` is not YAML.
    """
    sections = yaml.safe_load(text)
    found = {}
    for key in (*keys, *RENAMED):
        value: Any = sections
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found[key] = flat_value(value)
    return with_new_names(found)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Return each key whose values in the maps differ, with both values. A key that only one map has is ignored."""
    return {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}


def changes_since(text: str, config: RunConfig, rules: Rules) -> Changes:
    """Return the settings whose values differ between `text` and `config`, among the settings that `rules` compares.

    Args:
        text: the earlier configuration, as `dump_config` wrote it.

    Raises:
        yaml.YAMLError: if `text` is not YAML.
    """
    keys = [key for key in flat_config(config) if rules.is_used(key)]
    return changes(written_settings(text, keys), written_settings(dump_config(config), keys))


def describe_changes(changed: Changes) -> str:
    """Return the changes as one line of the form `setting before -> now, ...`."""
    shown = [
        f"{key} {before!r:.40} -> {now!r:.40}" for key, (before, now) in list(changed.items())[:MAX_SHOWN]
    ]
    more = f" and {len(changed) - MAX_SHOWN} more" if len(changed) > MAX_SHOWN else ""
    return ", ".join(shown) + more
