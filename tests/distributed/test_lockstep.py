"""One engine over 2 real gloo processes, whose schedulers must take the same decisions (see lockstep_worker)."""

import json
import subprocess
from pathlib import Path

import pytest
from preloaded.command import PYTHON
from taught import taught_folder

WORKER = Path(__file__).with_name("lockstep_worker.py")
NUM_SEEDS = 1
CLAIMS = [
    "turns_that_end_in_one_pass_of_a_small_cache",
    "preempted_sequences",
    "dynamic_sampling",
    "partial_rollouts",
    "trees",
    "a_rollout_that_is_broken_off_and_played_anew",
    "the_guard_stops_ranks_that_free_in_different_orders",
    "the_guard_stops_ranks_that_schedule_different_tokens",
    "the_guard_stops_ranks_that_sample_different_tokens",
    "the_guard_lets_ranks_in_step_play_on",
    "an_outage_holds_both_ranks_and_changes_nothing_that_they_play",
    "a_bug_in_a_tool_ends_both_ranks_with_its_line",
    "a_call_that_hangs_is_given_up_on_both_ranks",
    "both_ranks_wait_for_the_rewards_of_the_first",
    "a_bug_in_a_reward_ends_both_ranks_with_its_line",
    "a_stop_ends_the_wait_for_hanging_rewards_on_both_ranks",
    "an_engines_shared_memory_has_no_name_that_a_killed_run_would_leave",
]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("lockstep") / "results.json"
    launcher = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(WORKER), taught_folder(), str(out), str(NUM_SEEDS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("claim", CLAIMS)
def test_ranks_of_one_engine(results, claim):
    """Each claim is stated in lockstep_worker.py."""
    assert results[claim] == ""


def test_every_claim_of_the_worker_is_looked_at(results):
    assert sorted(results) == sorted(CLAIMS)
