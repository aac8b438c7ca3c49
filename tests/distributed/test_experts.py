"""A mixture of experts over 4 gloo processes, with and without expert parallelism (see expert_worker.py)."""

from __future__ import annotations

import json

import pytest
from ranks import run_ranks

CHECKS = {
    "ep2": [
        "transformers",
        "gradients",
        "scores",
        "updates",
        "nan_is_skipped",
        "resume",
        "router_replay",
        "balance",
    ],
    "dp4": ["transformers", "gradients", "updates", "from_two_expert_ranks"],
    "ep4": ["transformers", "gradients", "updates", "idle_experts"],
    "tp2_sequence": ["transformers", "gradients", "updates", "from_two_expert_ranks"],
    "tp2_sequence_ep2": [
        *("transformers", "gradients", "updates", "expert_load", "frozen_router"),
        *("router_replay", "balance"),
    ],
    "tp2_sequence_ep4": ["gradients", "scores", "updates", "from_two_expert_ranks"],
    "cp2_ep2": ["gradients", "turn_ratios", "updates", "expert_load", "router_replay", "balance"],
    "pp2_ep2": [
        *("transformers", "gradients", "updates", "from_two_expert_ranks", "expert_load"),
        *("router_replay", "balance"),
    ],
}
KEYS = [f"{check}[{layout}]" for layout, checks in CHECKS.items() for check in checks]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("experts")
    run_ranks(4, "expert_worker.py", folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("check", KEYS)
def test_experts(results, check) -> None:
    """Each check states its claim in expert_worker.py or update_worker.py."""
    assert results[check] == ""


def test_every_check_of_the_worker_is_looked_at(results) -> None:
    assert sorted(results) == sorted(KEYS)
