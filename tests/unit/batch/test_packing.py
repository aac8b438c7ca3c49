from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2tgpo.batch.balance import deal, microbatches
from a2tgpo.batch.packing import PADDING, Alignment, alignment, empty_batch, pack, packed_length
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.load import load_config
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.trajectory import Trajectory, Turn


def trajectory(prompt: list[int], *turns: tuple[list[int], list[int]]) -> Trajectory:
    return Trajectory(
        prompt_index=0,
        prompt_id="q",
        sample_index=0,
        prompt_tokens=prompt,
        turns=[
            Turn(
                tokens=sampled, rollout_logprobs=[-token / 100 for token in sampled], observation_tokens=seen
            )
            for sampled, seen in turns
        ],
        stop_reason="answer",
    )


# Padding has the id 0, but a sampled token with this id is trained on like any other token.
token_lists = st.lists(st.integers(0, 999), max_size=6)
trajectories = st.builds(
    lambda prompt, turns: trajectory(prompt, *turns),
    st.lists(st.integers(1, 999), min_size=1, max_size=5),
    st.lists(st.tuples(token_lists, token_lists), max_size=4),
)


def test_fields_of_a_two_turn_trajectory_are_aligned_on_the_predicting_position() -> None:
    batch = pack([trajectory([1, 2], ([10, 11], [20, 21]), ([12], [22]))], [0], align=Alignment())
    assert batch.tokens.tolist() == [[1, 2, 10, 11, 20, 21]]
    assert batch.targets.tolist() == [[2, 10, 11, 20, 21, 12]]
    assert batch.loss_mask.tolist() == [[False, True, True, False, False, True]]
    assert batch.turn_ids.tolist() == [[0, 0, 0, 0, 0, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch.cu_seqlens.tolist() == [0, 6]
    torch.testing.assert_close(
        batch.rollout_logprobs, torch.tensor([[0, -0.10, -0.11, 0, 0, -0.12]], dtype=torch.float32)
    )
    assert batch.turn_trajectory.tolist() == [0, 0]
    assert batch.turn_index.tolist() == [0, 1]


def test_alignment_padding_is_a_masked_segment_of_its_own() -> None:
    batch = pack([trajectory([1], ([5, 6], []))], [0], align=Alignment(row=4))
    assert batch.tokens.tolist() == [[1, 5, 0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 2, 4]
    assert batch.positions.tolist() == [[0, 1, 0, 1]]
    assert batch.loss_mask.tolist() == [[True, True, False, False]]
    assert batch.sequence_ids.tolist() == [[0, 0, PADDING, PADDING]]


def test_rows_are_padded_only_for_sequence_parallelism_and_fp8() -> None:
    whole, cut = ParallelConfig(tensor=4), ParallelConfig(tensor=4, sequence=True)
    assert (alignment(whole, Fp8Config()).row, alignment(cut, Fp8Config()).row) == (1, 4)
    for recipe, multiple in (("tensorwise", 16), ("mxfp8", 32), ("blockwise", 128)):
        fp8 = Fp8Config(format="e4m3", recipe=recipe)
        # Every piece of a row that is cut has a size that FP8 accepts.
        assert (alignment(whole, fp8).row, alignment(cut, fp8).row) == (multiple, 4 * multiple)
        split = alignment(ParallelConfig(tensor=4, sequence=True, context=2), fp8)
        assert split == Alignment(row=8 * multiple, segment=4)


def test_context_parallelism_cuts_every_segment_into_equal_pieces() -> None:
    two, three = (alignment(ParallelConfig(context=size), Fp8Config()) for size in (2, 3))
    assert (two, three) == (Alignment(row=4, segment=4), Alignment(row=6, segment=6))
    odd = alignment(ParallelConfig(tensor=5, sequence=True, context=3), Fp8Config())
    assert odd == Alignment(
        row=30, segment=6
    )  # a rank's third of the row has five pieces, and segments have six
    assert [two.segment_length(length) for length in (0, 1, 4, 5)] == [0, 4, 4, 8]
    batch = pack(
        [trajectory([1], ([5, 6], [])), trajectory([2, 3], ([7], []))],
        [0, 1],
        align=Alignment(row=8, segment=4),
    )
    assert batch.tokens.tolist() == [[1, 5, 0, 0, 2, 3, 0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.positions.tolist() == [[0, 1, 2, 3] * 2]
    assert batch.loss_mask.tolist() == [[True, True, False, False, False, True, False, False]]
    assert batch.sequence_ids.tolist() == [[0, 0, PADDING, PADDING, 1, 1, PADDING, PADDING]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(trajectories, min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.randoms(),
)
def test_tokens_trained_on_are_exactly_the_tokens_sampled(rollouts, multiple, segment, shuffler) -> None:
    """Each token is also predicted from exactly the tokens before it in its trajectory."""
    indices = shuffler.sample(range(len(rollouts)), len(rollouts))
    batch = pack(rollouts, indices, align=Alignment(row=multiple * segment, segment=segment))
    assert batch.num_tokens % (multiple * segment) == 0
    assert not (batch.cu_seqlens.diff() % segment).any()

    trained: dict[tuple[int, int], list[int]] = {}
    logprobs: dict[tuple[int, int], list[float]] = {}
    bounds = batch.cu_seqlens.tolist()
    for k in torch.nonzero(batch.loss_mask[0]).flatten().tolist():
        turn = int(batch.turn_ids[0, k])
        key = (int(batch.turn_trajectory[turn]), int(batch.turn_index[turn]))
        trained.setdefault(key, []).append(int(batch.targets[0, k]))
        logprobs.setdefault(key, []).append(float(batch.rollout_logprobs[0, k]))

        sequence = int(batch.sequence_ids[0, k])
        assert batch.trajectory_indices[sequence] == key[0]
        rollout = rollouts[key[0]]
        whole = rollout.tokens.tolist()
        seen = batch.tokens[0, bounds[sequence] : k + 1].tolist()
        assert seen == whole[: len(seen)]
        assert whole[len(seen)] == int(batch.targets[0, k])
        assert int(batch.positions[0, k]) == len(seen) - 1

    sampled = {
        (index, number): turn
        for index, rollout in enumerate(rollouts)
        for number, turn in enumerate(rollout.turns)
        if turn.tokens
    }
    assert trained == {key: turn.tokens.tolist() for key, turn in sampled.items()}
    for key, turn in sampled.items():
        assert logprobs[key] == pytest.approx(turn.rollout_logprobs, rel=1e-6)
    assert batch.num_turns == len(sampled)
    assert sum(packed_length(rollout) for rollout in rollouts) == int((batch.sequence_ids >= 0).sum())


def test_a_trajectory_without_sampled_tokens_leaves_its_neighbours_as_they_are() -> None:
    full = trajectory([1, 2], ([10, 11], []))
    silent = trajectory([7, 8, 9], ([], [3, 4]), ([], []))
    alone, beside = pack([full], [0], align=Alignment()), pack([full, silent], [1, 0], align=Alignment())
    assert packed_length(silent) == 0
    assert beside.trajectory_indices == (0,)
    for name in ("tokens", "targets", "loss_mask", "turn_ids", "positions", "cu_seqlens", "turn_trajectory"):
        assert torch.equal(getattr(alone, name), getattr(beside, name)), name


@pytest.mark.parametrize(
    "batch", [empty_batch(Alignment(row=2)), pack([trajectory([1, 2])], [0], align=Alignment(row=2))]
)
def test_a_batch_of_nothing_can_be_run_and_trains_nothing(batch) -> None:
    assert batch.num_tokens == 2
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert not batch.loss_mask.any()
    assert batch.num_turns == 0 and batch.num_sequences == 0


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        pack([trajectory([], ([1], []))], [0], align=Alignment())


def test_logprobs_that_do_not_match_their_tokens_are_refused() -> None:
    broken = trajectory([1], ([5, 6], []))
    broken.turns[0].rollout_logprobs.pop()
    with pytest.raises(ValueError, match="1 log-probs for 2 sampled tokens"):
        pack([broken], [0], align=Alignment())


@pytest.mark.parametrize(("overrides", "share"), [([], 0.97), (["precision/fp8.yaml"], 0.98)])
def test_microbatches_of_the_70b_configuration_are_full_and_as_many_on_every_replica(
    overrides: list[str], share: float
) -> None:
    """`share` is the share of positions that are tokens of trajectories, whose mean length is 2,000 and maximum
    length 6,192. FP8 pads rows of 8,192 tokens to multiples of 1,024.
    """
    configs = Path(__file__).parents[3] / "configs"
    config = load_config(configs / "train_70b.yaml", [str(configs / name) for name in overrides])
    rng = random.Random(3)
    count = config.update.prompts_per_minibatch * config.rollout.group_size
    num_replicas = 64 // config.parallel.model_ranks
    align = alignment(config.parallel, config.model.fp8)
    for _ in range(config.rollout.prompts_per_step // config.update.prompts_per_minibatch):
        lengths = [min(6192, max(300, int(rng.lognormvariate(7.52, 0.5)))) for _ in range(count)]
        assert 1800 < sum(lengths) / count < 2300
        replicas: list[list[int]] = [[] for _ in range(num_replicas)]
        for length, replica in zip(lengths, deal(lengths, num_replicas), strict=True):
            replicas[replica].append(align.segment_length(length))
        limit = config.update.max_microbatch_tokens
        most = max(len(microbatches(own, limit, row=align.row)) for own in replicas)
        dealt = [microbatches(own, limit, min_count=most, row=align.row) for own in replicas]
        assert {len(groups) for groups in dealt} == {most} and all(all(groups) for groups in dealt)
        totals = [
            sum(own[item] for item in group)
            for own, groups in zip(replicas, dealt, strict=True)
            for group in groups
        ]
        assert sum(lengths) / sum(total + -total % align.row for total in totals) >= share


def test_on_a_card_the_host_keeps_where_segments_begin_and_end() -> None:
    batch = pack([trajectory([1, 2], ([10, 11], []))], [0], align=Alignment())
    moved = batch.to(torch.device("meta"))
    assert moved.tokens.device.type == moved.turn_index.device.type == "meta"
    assert moved.cu_seqlens is batch.cu_seqlens
