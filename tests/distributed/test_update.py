"""Scoring, training and checkpoints over real gloo processes (see update_worker.py)."""

from __future__ import annotations

import json

import pytest
from ranks import run_ranks

LAYOUTS_OF = {
    "gradients": "dp4 tp2 tp2_sequence pp2_vpp2 pp2 pp2_uneven cp2 tp2_cp2_sequence cp2_pp2_vpp2 tp2_pp2",
    "output_rows": "dp4 tp2 tp2_sequence pp2 cp2 tp2_cp2_sequence cp2_pp2_vpp2",
    "entropy": "dp4 tp2 tp2_cp2_sequence cp2_pp2_vpp2",
    "turn_ratios": "pp2_vpp2 cp2 tp2_cp2_sequence cp2_pp2_vpp2 tp2_pp2",
    "sequence_objectives": "cp2 cp2_pp2_vpp2",
    "probes": "dp4 tp2_sequence pp2_vpp2",
    "scores": "dp4 tp2_sequence pp2_vpp2 pp2 pp2_uneven cp2 tp2_cp2_sequence tp2_pp2",
    "update": "pp2_vpp2 pp2_uneven cp2 tp2_cp2_sequence cp2_pp2_vpp2",
    "correction": "dp4 cp2 cp2_pp2_vpp2 tp2_pp2",
    "nan_is_skipped": "dp4 pp2_vpp2 pp2 cp2 tp2_pp2",
    "resume": "dp4 pp2_vpp2 cp2 tp2_pp2",
    "another_layout": "pp2_vpp2 pp2 tp2_cp2_sequence tp2_pp2",
    "values_of_another_layout": "pp2_vpp2 tp2_cp2_sequence tp2_pp2",
    "earlier_format": "dp4",
    "earlier_format_of_another_layout": "tp2_pp2",
    "resume_with_buckets": "dp4",
    "resume_bfloat16": "dp4",
    "resume_whole_optimizer": "dp4",
    "host_memory": "dp4",
    "memory_phases": "pp2_vpp2",
    "memory_phases_with_buckets": "dp4",
    "memory_phases_with_adapters": "pp2_vpp2",
    "fresh_adapters": "dp4 tp2_sequence",
    "adapters": "dp4 tp2 tp2_sequence pp2_vpp2 tp2_pp2",
    "adapter_update": "dp4 tp2 tp2_sequence",
    "resume_adapters": "dp4 tp2_pp2",
    "resume_adapters_with_buckets": "dp4",
    "resume_adapters_elsewhere": "tp2_pp2",
    "data_parallel_updates": "dp4",
    "extrapolated_updates": "dp4",
    "extrapolated_elsewhere": "tp2_sequence",
    "retention": "dp4",
    "clip_cov": "dp4",
    "one_best": "dp4",
}
CHECKS = [f"{check}[{layout}]" for check, layouts in LAYOUTS_OF.items() for layout in layouts.split()]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("update")
    run_ranks(4, "update_worker.py", folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_update(results, check) -> None:
    """Each check states its claim in update_worker.py."""
    assert results[check] == ""


def test_every_check_of_the_worker_is_looked_at(results) -> None:
    assert sorted(results) == sorted(CHECKS)
