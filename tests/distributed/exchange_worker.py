"""Compare exchange, advantages and sums over 4 ranks, in two layouts, with one process that has all trajectories.

torchrun --nproc-per-node 4 exchange_worker.py RESULTS.json
"""

import random
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from claims import Claims

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.batch.exchange import exchange
from a2tgpo.collect.assignment import Assignment, queue_store
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.method_part import ADVANTAGE
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.loss.aggregate import token_weights
from a2tgpo.parallel.collectives import all_gather_object, all_reduce_sum
from a2tgpo.parallel.cpu_collectives import PIECE, all_gather, reduce_scatter
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.parallel.initialize import initialize, lay_out, shutdown
from a2tgpo.record.rollout_summary import RolloutSummary, best_and_worst, gather_summaries, gather_texts
from a2tgpo.trajectory import Call, TokenIds, Trajectory, Turn

NUM_PROMPTS, GROUP_SIZE, MAX_TURNS = 5, 6, 4


def all_trajectories(seed: int) -> list[Trajectory]:
    rng = random.Random(seed)
    made = []
    for prompt in range(NUM_PROMPTS):
        for sample in range(GROUP_SIZE):
            turns = []
            for _ in range(rng.randint(0, MAX_TURNS)):
                tokens = [rng.randrange(100) for _ in range(rng.randint(1, 30))]
                gain = None if rng.random() < 0.1 else 1000.0 + rng.gauss(0, 0.1)
                turn = Turn(
                    tokens=tokens,
                    rollout_logprobs=[-0.5] * len(tokens),
                    calls=[Call(tool="search", arguments="q")],
                    info_gain=gain,
                )
                turn.observation_tokens = TokenIds([rng.randrange(100) for _ in range(rng.randint(1, 40))])
                if rng.random() < 0.5:
                    turn.observation_tokens = TokenIds([5, 6])  # a state that other rollouts reach too
                turns.append(turn)
            turns.append(Turn(tokens=[7, 8], rollout_logprobs=[-0.1, -0.25]))
            made.append(
                Trajectory(
                    prompt_index=prompt,
                    prompt_id=f"p{prompt} \u00e9",
                    sample_index=sample,
                    prompt_tokens=[1, 2, 3],
                    turns=turns,
                    stop_reason="answer",
                    outcome_reward=rng.choice([-1.0, 0.0, 1.0]),
                    baseline_prob=0.25,
                )
            )
    return made


def table_of(trajectories):
    return build_turn_table(trajectories, num_prompts=NUM_PROMPTS, max_turns=MAX_TURNS)


def check_exchange(groups) -> list[Trajectory]:
    """Every trajectory arrives once and unchanged at all ranks of one replica, whichever engine played it."""
    everything = all_trajectories(0)
    results = []
    for deal_by in (lambda t: t.prompt_index % groups.world_size, lambda t: 0, lambda t: t.sample_index % 2):
        played = [t for t in everything if deal_by(t) == groups.rank]
        random.Random(groups.rank).shuffle(played)
        results.append(exchange(played, groups, prompts_per_minibatch=2))
    assert results[0] == results[1] == results[2], "the share depends on who played what"
    shares = [None] * groups.world_size
    dist.all_gather_object(shares, (groups.dp_rank, results[0]))
    by_replica = dict(shares)
    for dp_rank, share in shares:
        assert share == by_replica[dp_rank], "ranks of one replica hold different trajectories"
    order = sorted(
        (t for share in by_replica.values() for t in share), key=lambda t: (t.prompt_index, t.sample_index)
    )
    assert order == everything, "a trajectory was lost, doubled or changed"
    loads = [sum(t.num_tokens for t in share) for share in by_replica.values()]
    assert max(loads) <= 1.2 * min(loads), f"replicas are not balanced: {loads}"
    return results[0]


def check_advantages(groups, mine: list[Trajectory]) -> None:
    """Advantages equal those of one process (1e-12 relative), for the balanced split and for a split with empty
    ranks.
    """
    everything = all_trajectories(0)
    everything_on_first = everything if groups.dp_rank == 0 else []
    for share in (mine, everything_on_first):
        for name in ADVANTAGE.names():
            config = AlgorithmConfig(advantage=name)
            whole = compute_advantages(table_of(everything), config, dp_group=None)
            rows = [everything.index(t) for t in share]
            spread = compute_advantages(table_of(share), config, dp_group=groups.dp_group)
            # igpo_joint puts gains near 1000 and outcomes near 0 into one pool, so compare relative to the size of
            # the values
            torch.testing.assert_close(spread.advantages, whole.advantages[rows], rtol=1e-12, atol=1e-9)
            error = (spread.advantages - whole.advantages[rows]).abs().max().item() if rows else 0.0
            assert error <= 1e-9, (name, error)


def check_texts_shown_on_rank_0(groups, mine: list[Trajectory]) -> None:
    """Rank 0 gets every gain, and the rollouts that one process would choose. Their texts come from the ranks that
    have these rollouts.
    """
    if groups.is_replica_first:
        summaries = gather_summaries(mine, groups)
        everything = all_trajectories(0)
        assert summaries == [RolloutSummary.of(trajectory) for trajectory in everything]
        chosen = best_and_worst(summaries, 7)
        texts = gather_texts(chosen, mine, lambda row: repr(mine[row]), groups)
        expected = {
            name: repr(t) for name, s in chosen.items() for t in everything if RolloutSummary.of(t) == s
        }
        assert texts == (expected if groups.rank == 0 else {}) and len(expected) == 7
        assert list(texts) == (list(expected) if groups.rank == 0 else [])


def check_small_gains_to_the_last_digits(groups) -> None:
    """With gains of ordinary size the split changes no value by more than 1e-12."""
    everything = all_trajectories(1)
    for trajectory in everything:
        for turn in trajectory.turns:
            if turn.info_gain is not None:
                turn.info_gain -= 1000.0
    share = [t for i, t in enumerate(everything) if i % 3 % groups.dp_size == groups.dp_rank]
    for name in ADVANTAGE.names():
        config = AlgorithmConfig(advantage=name)
        whole = compute_advantages(table_of(everything), config, dp_group=None).advantages
        spread = compute_advantages(table_of(share), config, dp_group=groups.dp_group).advantages
        difference = (spread - whole[[everything.index(t) for t in share]]).abs()
        error = difference.max().item() if share else 0.0
        assert error <= 1e-12, (name, error)


def check_token_weights(groups, mine: list[Trajectory]) -> None:
    """The weights of tokens are those of the whole mini-batch."""
    everything = all_trajectories(0)
    counts = torch.tensor([t.num_sampled_tokens for t in everything])
    my_counts = torch.tensor([t.num_sampled_tokens for t in mine])
    for aggregation in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        whole = token_weights(counts, aggregation=aggregation, norm_length=9, dp_group=None)
        part = token_weights(my_counts, aggregation=aggregation, norm_length=9, dp_group=groups.dp_group)
        torch.testing.assert_close(part, whole[[everything.index(t) for t in mine]], rtol=1e-15, atol=0)


def check_the_queue_of_prompts(groups) -> None:
    """Two engines of two ranks take the prompts of one queue. The ranks of an engine get the same prompts, and no
    prompt is taken twice or left over.
    """
    pairs = [dist.new_group([first, first + 1]) for first in (0, 2)]
    engine_group = EngineGroup(
        index=groups.rank // 2, count=2, rank=groups.rank % 2, group=pairs[groups.rank // 2]
    )
    config = RolloutConfig(prompts_per_step=30, group_size=4, max_concurrent=8)
    questions = SimpleNamespace(
        questions=[SimpleNamespace(hops=0)] * 30,
        prompts=lambda indices, positions: [(indices[place], place) for place in positions],
    )
    assignment = Assignment(config, questions, engine_group, store=queue_store())
    for shift in (0, 100):  # the second draw has a queue of its own
        asked = [(place + shift) % 30 for place in range(30)]
        begun, queue = assignment.divide(asked, range(30))
        assert len(begun) == 2
        mine = begun + list(queue)
        parts = all_gather_object((engine_group.index, mine), dist.group.WORLD)
        assert all(part == mine for index, part in parts if index == engine_group.index)
        first, second = (dict(parts)[index] for index in range(2))
        assert sorted(first + second, key=lambda item: item[1]) == list(zip(asked, range(30), strict=True))


def check_nothing(groups) -> None:
    """Ranks that played nothing exchange nothing."""
    assert exchange([], groups, prompts_per_minibatch=2) == []


def check_sharded_sums(groups) -> None:
    """A reduce-scatter gives each rank the sum of its shard over all ranks, and an all-gather gives all sums to all
    ranks, both in place and in another tensor.
    """
    group = groups.dp_group
    for length in (1, 2 * PIECE + 3):
        generator = torch.Generator().manual_seed(groups.dp_rank)
        values = torch.randint(-100, 100, (groups.dp_size * length,), generator=generator).float()
        totals = all_reduce_sum(values, group)
        apart, own = torch.empty(length), values.view(groups.dp_size, length)[groups.dp_rank]
        for output in (apart, own):
            reduce_scatter(output, values, group=group)
            assert torch.equal(output, totals.view(groups.dp_size, length)[groups.dp_rank])
        for output, shard in ((torch.empty_like(values), apart), (values, own)):
            all_gather(output, shard, group=group)
            assert torch.equal(output, totals)


def main(out: str) -> None:
    claims = Claims()
    initialize(ParallelConfig(timeout_s=60), seed=0)
    for tensor in (1, 2):
        groups = lay_out(ParallelConfig(tensor=tensor, timeout_s=60), seed=0)
        mine = claims.check(f"exchange[tp{tensor}]", check_exchange, groups)
        for check in (check_texts_shown_on_rank_0, check_advantages, check_token_weights):
            claims.check(f"{check.__name__.removeprefix('check_')}[tp{tensor}]", check, groups, mine)
        for check in (
            check_small_gains_to_the_last_digits,
            check_the_queue_of_prompts,
            check_nothing,
            check_sharded_sums,
        ):
            claims.check(f"{check.__name__.removeprefix('check_')}[tp{tensor}]", check, groups)
    claims.save(out)
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
