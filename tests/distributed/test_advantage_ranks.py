"""Every method's advantages over four gloo processes, for random spreads (see advantage_worker)."""

import json

import pytest
from ranks import run_ranks

from a2tgpo.config.method_part import ADVANTAGE

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("advantages") / "results.json"
    run_ranks(4, "advantage_worker.py", out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", ADVANTAGE.names())
def test_advantages_do_not_depend_on_which_rank_holds_a_rollout(outcomes, name):
    assert outcomes[name] == ""
