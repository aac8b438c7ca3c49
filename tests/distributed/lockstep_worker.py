"""Checks of one engine over 2 ranks, whose schedulers must take the same decisions. test_lockstep.py runs this
program.

torchrun --nproc-per-node 2 lockstep_worker.py MODEL OUT [SEEDS [CLAIM ...]]

MODEL is the taught tiny model. OUT is a JSON file with the outcome of each claim, which is empty if the claim holds.
Claims about schedules are tried with SEEDS seeds (1).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import re
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from lockstep_bench import PREEMPTING, Bench, ShuffledSearch
from scripted_search import ScriptedSearch

from a2tgpo.collect.rewarded_rollout import RewardedRollout
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.reward import RewardConfig
from a2tgpo.config.rollout import PartialConfig, TreeConfig
from a2tgpo.evaluate.evaluate import answer_questions
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.reward.episode import reader_of
from a2tgpo.reward.load import NamedReward
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.reward.total import RewardFaultError
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import RolloutInterruptedError
from a2tgpo.rollout.lockstep import LockstepError
from a2tgpo.rollout.tool_pool import ToolFaultError
from a2tgpo.search.errors import SearchUnavailableError

# -- schedules, each with many seeds -------------------------------------------------------------------------


def check_turns_that_end_in_one_pass_of_a_small_cache(bench, seed):
    with bench.open(search=ShuffledSearch(seed)) as (parts, schedule):
        bench.play(parts, seed=seed)
        seen = schedule.seen
        assert seen["evictions"] > 20 and seen["passes with several ends"] > 5, seen


def check_preempted_sequences(bench, seed):
    with bench.open(search=ShuffledSearch(seed), blocks=PREEMPTING) as (parts, schedule):
        bench.play(parts, seed=seed, num_prompts=4)
        assert schedule.seen["preemptions"] > 3, schedule.seen


def check_dynamic_sampling(bench, seed):
    with bench.open(search=ShuffledSearch(seed), dynamic_sampling=True, max_draws=2) as (parts, _):
        played = bench.steps(parts).play(version=seed)
        mine = played.metrics.values()["sampling/draws"]
        bench.assert_equal((mine, bench.rank == 0 or not played.trajectories))
        assert mine == 2, mine


def check_partial_rollouts(bench, seed):
    partial = PartialConfig(tokens_per_step=1, extra_prompts=3, max_staleness=2)
    with bench.open(search=ShuffledSearch(seed), partial=partial) as (parts, _):
        steps = bench.steps(parts)
        for step in range(3):
            steps.play(version=step)
            own = parts.state.carried.own
            bench.assert_equal([member.to_dict() for group in own for member in group.trajectories])
        assert any(not group.is_complete for group in own), "nothing was carried over"


def check_trees(bench, seed):
    settings = dict(tree=TreeConfig(initial=2, rounds=2), dynamic_sampling=True, max_draws=2)
    with bench.open(search=ShuffledSearch(seed), **settings) as (parts, _):
        trajectories, _ = bench.play(parts, seed=seed)
        branches = [t for t in trajectories if t.branch is not None]
        assert len(branches) == len(trajectories) / 2 and any(t.branch.owners for t in branches)
        played = bench.steps(parts).play(version=seed)
        metrics, sizes = played.metrics.values(), Counter(t.prompt_index for t in played.trajectories)
        bench.assert_equal(metrics["sampling/draws"])
        if bench.rank == 0:
            assert sizes == dict.fromkeys(range(6), 4) and metrics["tree/branches"] == 12, (sizes, metrics)


def check_a_rollout_that_is_broken_off_and_played_anew(bench, seed):
    draw = random.Random(seed)
    with bench.open(search=ShuffledSearch(seed)) as (parts, schedule):
        for rank in (0, 1):
            left = [draw.randrange(1, 5)]

            def should_stop(rank=rank, left=left):
                left[0] -= 1
                return bench.rank == rank and left[0] <= 0

            message = bench.raised(
                RolloutInterruptedError,
                lambda should_stop=should_stop: bench.play(parts, seed=seed, should_stop=should_stop),
            )
            assert message == "", message
        bench.play(parts, seed=seed)
        assert schedule.seen["evictions"] > 20, schedule.seen


# -- faults, each once -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(owner, name, make):
    """In the `with` block, replace `owner.name` by `make(owner.name)`."""
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


def reversed_aborts(abort_in_order):
    """On this rank, abort requests that end together from the last to the first."""

    def abort_in_reverse(core):
        abort_in_order(core)
        abort = core.abort_requests
        core.abort_requests = lambda request_ids: abort(request_ids[::-1])

    return abort_in_reverse


def one_token_more(schedule):
    """From the fifth pass on, schedule the first request with one token more than it has."""
    passes = []

    def scheduled(*args, **kwargs):
        output = schedule(*args, **kwargs)
        passes.append(1)
        if len(passes) >= 5:
            output.num_scheduled_tokens[next(iter(output.num_scheduled_tokens))] += 1
        return output

    return scheduled


def another_token(update):
    """From the fifth pass on, change the token that is sampled for the first request."""
    passes = []

    def updated(scheduler, scheduler_output, model_output):
        passes.append(1)
        if len(passes) >= 5:
            model_output.sampled_token_ids[0][0] ^= 1
        return update(scheduler, scheduler_output, model_output)

    return updated


def check_the_guard_stops_ranks_that_free_in_different_orders(bench, seed):
    from a2tgpo.rollout import vllm_engine

    change = replaced(vllm_engine, "abort_in_order", reversed_aborts)
    message = stopped_by_guard(bench, change)
    assert re.match(out_of_step(r"\d+", r"freed turn-\d+", r"freed turn-\d+"), message), message


def check_the_guard_stops_ranks_that_schedule_different_tokens(bench, seed):
    from vllm.v1.core.sched.scheduler import Scheduler

    message = stopped_by_guard(bench, replaced(Scheduler, "schedule", one_token_more))
    what = r"scheduled turn-0 \({} tokens\)"
    assert re.match(out_of_step("5", what.format(1), what.format(2)), message), message


def check_the_guard_stops_ranks_that_sample_different_tokens(bench, seed):
    """The guard stops the ranks before any decision depends on the tokens, which could end a turn on one rank
    only.
    """
    from a2tgpo.rollout.lockstep import Lockstep

    watch = Lockstep._watch

    def watch_changed(lockstep, scheduler):
        watch(lockstep, scheduler)
        update = scheduler.update_from_output
        scheduler.update_from_output = functools.partial(another_token(lambda _, *args: update(*args)), None)

    message = stopped_by_guard(bench, mock.patch.object(Lockstep, "_watch", watch_changed))
    what = r"sampled turn-0 \(\[\d+\]\)"
    assert re.match(out_of_step("5", what, what), message), message


def stopped_by_guard(bench, change):
    """Return the line with which both ranks end if `change` is made on rank 1."""
    with (
        change if bench.rank == 1 else contextlib.nullcontext(),
        bench.open(search=ScriptedSearch(), guarded=True, watched=False) as (parts, _),
    ):
        return bench.raised(LockstepError, lambda: bench.play(parts, seed=0))


def out_of_step(number, first, second):
    place = f"the ranks of one engine are out of step at its pass {number}"
    return f"{place}: rank 0 {first}, rank 1 {second}; start again"


def check_a_bug_in_a_tool_ends_both_ranks_with_its_line(bench, seed):
    class Broken(ScriptedSearch):
        def search(self, query):
            raise KeyError("a bug")

    with bench.open(search=Broken()) as (parts, _):
        message = bench.raised(ToolFaultError, lambda: bench.play(parts, seed=0))
    assert re.match(r"the search tool failed with KeyError: 'a bug' at lockstep_worker\.py:\d+; ", message), (
        message
    )


def check_a_call_that_hangs_is_given_up_on_both_ranks(bench, seed):
    freed = threading.Event()

    class Hanging(ScriptedSearch):
        def search(self, query):
            if query == "capital of France":
                freed.wait(120)
            return super().search(query)

    with bench.open(search=Hanging(), limits={"call_timeout_s": 0.3, "max_concurrent_calls": 2}) as (
        parts,
        _,
    ):
        _, counts = bench.play(parts, seed=0)
        bench.assert_equal(counts.hung_calls)
        assert counts.hung_calls > 4, counts
        freed.set()


class ComingAndGoing(ScriptedSearch):
    """A search that is out of service for the next `num_refusals` calls."""

    num_refusals = 0

    def search(self, query):
        with self._lock:
            self.num_refusals -= 1
            is_out = self.num_refusals >= 0
        if is_out:
            raise SearchUnavailableError("down")
        return super().search(query)


def check_an_outage_holds_both_ranks_and_changes_nothing_that_they_play(bench, seed):
    def tokens():
        trajectories, counts = bench.play(parts, seed=0)
        return [(t.tokens, [turn.tool_failed for turn in t.turns]) for t in trajectories], counts

    search = ComingAndGoing()
    with bench.open(search=search, limits={"outage_limit_s": 1.5}) as (parts, _):
        expected, _ = tokens()
        search.num_refusals = 20
        found, counts = tokens()
        assert found == expected and counts.failed_calls == 0
        assert bench.rank == 1 or counts.outage_s > 0, counts
        search.num_refusals = 10**6
        should_stop = lambda: bool(parts.rollout.outage.verdict)  # noqa: E731
        assert (
            bench.raised(RolloutInterruptedError, lambda: bench.play(parts, seed=0, should_stop=should_stop))
            == ""
        )
        search.num_refusals = 0
        assert tokens()[0] == expected


def check_the_guard_lets_ranks_in_step_play_on(bench, seed):
    """The rollout does not depend on how often the ranks compare their passes."""
    found = []
    for every in (0, 1, 7):
        with bench.open(search=ScriptedSearch(), guarded=every, watched=False) as (parts, _):
            trajectories, _ = bench.play(parts, seed=0)
            found.append([trajectory.to_dict() for trajectory in trajectories])
    assert found[0] == found[1] == found[2]


def trained(parts, prompts, score, *, should_stop):
    """Return (tokens, rewards) of each trajectory."""
    reward = TrajectoryReward(reader=reader_of(parts.rollout.protocol))
    with contextlib.closing(pool_of(score)) as pool:
        rollout = RewardedRollout(
            parts.rollout, reward, pool, seed=0, should_stop=should_stop, engine_group=parts.engine_group
        )
        trajectories = rollout.play(prompts, version=0, counts=RolloutCounts())
    return [(trajectory.tokens, trajectory.rewards) for trajectory in trajectories]


def evaluated(parts, prompts, score, *, should_stop):
    """Return (answer without its scores, scores) of each question."""
    with contextlib.closing(pool_of(score)) as pool:
        answers = answer_questions(
            parts.rollout,
            prompts,
            rewards=pool,
            engine_group=parts.engine_group,
            should_stop=should_stop,
        )
        found = sorted(answers, key=lambda answer: answer.question_id)
    return [(vars(answer) | {"scores": None}, answer.scores) for answer in found]


def pool_of(score):
    reward = SimpleNamespace(score=score)
    named = NamedReward(label="mine", weight=1.0, reward=reward, path=Path(__file__))
    return RewardPool([named], RewardConfig(num_workers=16, format_gate=False))


def check_both_ranks_wait_for_the_rewards_of_the_first(bench, seed):
    def late(episode):
        assert bench.rank == 0
        threading.Event().wait(0.1)
        return 1.0

    with bench.open(search=ScriptedSearch()) as (parts, _):
        for play, of_first in ((trained, {"mine": 1.0}), (evaluated, {"mine": 1.0, "reward": 1.0})):
            found = play(parts, parts.train_prompts.prompts(range(3)), late, should_stop=lambda: False)
            bench.assert_equal([played for played, _ in found])
            assert found and all(rewards == (of_first if bench.rank == 0 else {}) for _, rewards in found)


def check_a_bug_in_a_reward_ends_both_ranks_with_its_line(bench, seed):
    def wrong(episode):
        return {}[episode.question_id]

    with bench.open(search=ScriptedSearch()) as (parts, _):
        prompts = parts.train_prompts.prompts(range(3))
        for play, should_stop in itertools.product((trained, evaluated), (None, lambda: False)):
            run = functools.partial(play, parts, prompts, wrong, should_stop=should_stop)
            message = bench.raised(RewardFaultError, run)
            assert message.startswith("reward lockstep_worker.py:"), message


def check_a_stop_ends_the_wait_for_hanging_rewards_on_both_ranks(bench, seed):
    with bench.open(search=ScriptedSearch()) as (parts, _):
        prompts = parts.train_prompts.prompts(range(3))
        for play, number in ((trained, 3 * parts.config.rollout.group_size), (evaluated, 3)):
            freed, hanging = threading.Event(), []

            def hang(episode, freed=freed, hanging=hanging):
                hanging.append(episode)
                freed.wait(120)
                return 1.0

            all_hang = lambda hanging=hanging, number=number: len(hanging) == number  # noqa: E731
            run = functools.partial(play, parts, prompts, hang, should_stop=all_hang)
            assert bench.raised(RolloutInterruptedError, run) == ""
            assert len(hanging) == (number if bench.rank == 0 else 0)
            freed.set()


def check_an_engines_shared_memory_has_no_name_that_a_killed_run_would_leave(bench, seed):
    with bench.open(search=ScriptedSearch()):
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "cpushm" in line]
        assert len(mapped) >= 2 and all(line.endswith("(deleted)") for line in mapped), mapped


CHECKS = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}
WITH_SEEDS = ("turns_that_end", "preempted", "dynamic", "partial", "a_rollout_that_is_broken_off")


def outcome(check, bench, seed):
    """Return "" if `check` holds on both ranks, and otherwise the fault that the first failing rank reports."""
    try:
        check(bench, seed)
        fault = ""
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"[:800]
        if not isinstance(error, AssertionError):
            traceback.print_exc()
    faults = all_gather_object(fault, bench.group)
    return next((f"rank {rank}, seed {seed}: {fault}" for rank, fault in enumerate(faults) if fault), "")


def run(path, out, num_seeds="1", *chosen):
    groups = initialize(ParallelConfig(tensor=2, timeout_s=60), seed=3)
    bench = Bench(path, groups)
    results = {}
    for name in chosen or CHECKS:
        seeds = range(int(num_seeds) if name.startswith(WITH_SEEDS) else 1)
        faults = [outcome(CHECKS[name], bench, seed) for seed in seeds]
        results[name] = next(filter(None, faults), "")
        if groups.rank == 0:
            print(
                f"{name}: {sum(not fault for fault in faults)} of {len(faults)} hold {results[name]}",
                flush=True,
            )
    if groups.rank == 0:
        Path(out).write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    run(*sys.argv[1:])
