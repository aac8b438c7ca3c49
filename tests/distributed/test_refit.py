"""Engines and Megatron in the same 2 real gloo processes (see refit_worker)."""

import json

import pytest
from ranks import run_ranks
from taught import taught_folder
from tiny_models import save_tiny

CLAIMS = {
    "replicas": [
        *(f"{check}[dp2]" for check in ("what_a_refit_moves", "three_cycles", "training_step", "world")),
        *(f"{check}[tp2]" for check in ("what_a_refit_moves", "one_engines_refusal_stops_both")),
        *(f"{check}[tp2]" for check in ("three_cycles", "one_bad_rank_stops_both", "adapters", "world")),
        *(f"{check}[pp2]" for check in ("what_a_refit_moves", "one_engines_refusal_stops_both", "world")),
    ],
    "shared": [
        "both_ranks_play_alike",
        "groups_are_carried_on",
        "carried_logprobs",
        "three_cycles",
        "an_engine_per_rank_plays_what_the_one_carried",
        "engines_take_prompts_on_demand",
        "world",
    ],
}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> dict[str, str]:
    """Results for a mixture of experts with tied embeddings, because vLLM's CPU kernels keep packed copies of
    both.
    """
    folder = tmp_path_factory.mktemp("replicas")
    out, model = folder / "results.json", save_tiny(folder / "model", "qwen3_moe", tied=True)
    run_ranks(2, "refit_worker.py", out, "replicas", model)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shared")
    out = folder / "results.json"
    run_ranks(2, "refit_worker.py", out, "shared", taught_folder(), folder)
    return json.loads(out.read_text())


@pytest.mark.parametrize("claim", CLAIMS["replicas"])
def test_one_engine_per_rank_follows_the_trainer(replicas, claim):
    """Each claim is stated in refit_worker.py."""
    assert replicas[claim] == ""


@pytest.mark.parametrize("claim", CLAIMS["shared"])
def test_one_engine_over_both_ranks_plays_alike_and_follows_the_trainer(shared, claim):
    """Each claim is stated in refit_worker.py."""
    assert shared[claim] == ""


def test_every_claim_of_the_worker_is_looked_at(replicas, shared):
    assert sorted(replicas) == sorted(CLAIMS["replicas"]) and sorted(shared) == sorted(CLAIMS["shared"])
