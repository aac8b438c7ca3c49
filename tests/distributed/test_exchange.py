"""Exchange, group statistics and sharded sums over four gloo processes (see exchange_worker)."""

import json

import pytest
from ranks import run_ranks

CHECKS = (
    *("exchange", "texts_shown_on_rank_0", "advantages", "token_weights"),
    *("small_gains_to_the_last_digits", "the_queue_of_prompts", "nothing", "sharded_sums"),
)
CLAIMS = [f"{check}[tp{tensor}]" for tensor in (1, 2) for check in CHECKS]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("exchange") / "results.json"
    run_ranks(4, "exchange_worker.py", out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("claim", CLAIMS)
def test_exchange_and_advantages_do_not_depend_on_the_spread(outcomes, claim):
    """Each claim is stated in exchange_worker.py."""
    assert outcomes[claim] == ""


def test_every_claim_of_the_worker_is_looked_at(outcomes):
    assert sorted(outcomes) == sorted(CLAIMS)
