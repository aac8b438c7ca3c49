"""Renamed keys: refused in files and arguments, but accepted in the records of runs of earlier versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "search.num_workers": "tools.max_concurrent_calls",
    "search.max_passage_tokens": "tools.max_part_tokens",
    "search.timeout_s": "search.request_timeout_s",
    "search.on_outage": "tools.on_outage",
    "search.outage_limit_s": "tools.outage_limit_s",
}
"""New key by old key."""


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of settings that an earlier version recorded (by dotted key) to those of this version."""
    return {RENAMED.get(key, key): value for key, value in settings.items()}
