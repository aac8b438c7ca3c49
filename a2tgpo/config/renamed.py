"""Keys that have been renamed. Only records of earlier versions may use the old keys."""

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
"""Maps each old key to its new key."""


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings`, a mapping by dotted key, with every old key renamed."""
    return {RENAMED.get(key, key): value for key, value in settings.items()}
