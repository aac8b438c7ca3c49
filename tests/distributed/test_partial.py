"""Partial rollouts and the bank over real gloo processes (see partial_worker)."""

import json

import pytest
from ranks import run_ranks

CLAIMS = [
    "a_second_wave_is_broken_off_on_all_ranks_or_on_none",
    "ranks_agree_on_the_groups_that_dynamic_sampling_drops",
    "banks_of_two_attempts_are_not_mixed",
    "a_shared_engine_banks_one_file_with_what_is_each_ranks_own",
]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("partial")
    run_ranks(2, "partial_worker.py", folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("claim", CLAIMS)
def test_ranks_that_see_different_things_decide_alike(outcomes, claim):
    """Each claim is stated in partial_worker.py."""
    assert outcomes[claim] == ""


def test_every_claim_of_the_worker_is_looked_at(outcomes):
    assert sorted(outcomes) == sorted(CLAIMS)
