"""Which groups a step takes, which are carried over, and how they survive a checkpoint."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.collect.carried_pool import (
    Carried,
    Entry,
    bounded,
    carried,
    carried_file,
    encode,
    engines_for,
    is_due,
    read,
    select,
    to_finish,
    trajectories_of,
    with_complete,
)
from a2tgpo.config.rollout import PartialConfig, RolloutConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.rollout.carried_group import CarriedGroup, copied, shortened
from a2tgpo.rollout.multi_turn import MIN_TURN_TOKENS, Limits
from a2tgpo.trajectory import Call, Prompt, Trajectory, Turn, encode_records


def entry(begun: int, index: int, *, complete: bool = False, engine: int = 0) -> Entry:
    return Entry(begun=begun, index=index, question=100 * begun + index, engine=engine, is_complete=complete)


def trajectory(index: int, sample: int, reason: str) -> Trajectory:
    turn = Turn(
        tokens=[5, 6],
        rollout_logprobs=[-0.1, -1e-17],
        observation_tokens=[7],
        calls=[Call(tool="search", arguments="x")],
        version=3,
    )
    return Trajectory(
        prompt_index=index,
        prompt_id=f"q{index}",
        sample_index=sample,
        prompt_tokens=[1, 2],
        turns=[turn],
        stop_reason=reason,
        baseline_prob=0.1 + 0.2 if reason else None,
    )


def group(begun: int, index: int, *reasons: str) -> CarriedGroup:
    prompt = Prompt(
        index=index, id=f"q{index}", question="who?", answers=("a", "b"), tokens=(1, 2), hops=index
    )
    members = [trajectory(index, sample, reason) for sample, reason in enumerate(reasons)]
    return CarriedGroup(begun=begun, question=100 * begun + index, prompt=prompt, trajectories=members)


@given(
    num_groups=st.integers(1, 5),
    extra_share=st.floats(0, 1),
    max_staleness=st.integers(1, 4),
    num_engines=st.integers(1, 3),
    num_steps=st.integers(1, 12),
    luck=st.floats(0, 1),
    random=st.randoms(use_true_random=False),
)
def test_every_step_is_full_nothing_is_lost_and_nothing_gets_too_old(
    num_groups, extra_share, max_staleness, num_engines, num_steps, luck, random
):
    extra = round(extra_share * num_groups)
    carried: list[Entry] = []
    begun, trained = set(), []
    for step in range(num_steps):
        missing = num_groups + extra - len(carried)
        assert missing >= num_groups, "no more than extra_prompts groups are carried over"
        owners = engines_for(carried, missing, num_engines=num_engines)
        fresh = [entry(step, index, engine=owner) for index, owner in enumerate(owners)]
        begun.update(new.key for new in fresh)
        in_play = [*carried, *fresh]
        due = {old.key for old in in_play if is_due(old, step, max_staleness=max_staleness)}
        lucky = {e.key for e in in_play if random.random() < luck}
        in_play = with_complete(in_play, due | lucky)
        num_complete = sum(e.is_complete for e in in_play)
        late = to_finish(in_play, num_groups=num_groups)
        in_play = with_complete(in_play, {e.key for e in late})
        taken, carried = select(in_play, num_groups=num_groups)
        assert len(taken) == num_groups and taken == sorted(taken) and carried == sorted(carried)
        assert all(step - e.begun <= max_staleness for e in taken)
        assert all(e.is_complete for e in taken)
        # No complete group that stays is older than a group that is taken.
        assert all(left > taken[-1] for left in carried if left.is_complete)
        # Only as many groups are played to the end as are needed, and these are the oldest.
        assert len(late) == max(0, num_groups - num_complete)
        assert all(left > late[-1] for left in carried if late and not left.is_complete)
        trained += [e.key for e in taken]
        assert len(set(trained)) == len(trained)
        assert begun == set(trained) | {left.key for left in carried}


@given(
    num_groups=st.integers(1, 5),
    extra_share=st.floats(0, 1),
    max_staleness=st.integers(1, 3),
    more=st.integers(0, 9),
    small_set=st.tuples(st.floats(0, 1), st.floats(0.1, 10)),
    seed=st.integers(0, 5),
    luck=st.floats(0, 1),
    random=st.randoms(use_true_random=False),
)
def test_no_question_is_in_play_twice_even_with_the_fewest_or_with_a_small_set(
    num_groups, extra_share, max_staleness, more, small_set, seed, luck, random
):
    partial = PartialConfig(
        tokens_per_step=1, extra_prompts=round(extra_share * num_groups), max_staleness=max_staleness
    )
    num_questions = partial.extra_prompts + num_groups + more
    RolloutConfig(prompts_per_step=num_groups, partial=partial).check_questions(num_questions)
    share, weight = small_set
    small = min(num_questions - 1, round(share * num_questions))
    sizes, weights = ([small, num_questions - small], [weight, 1]) if small else ([num_questions], None)
    sampler = PromptSampler(sizes, num_groups, seed, weights=weights)
    carried: list[Entry] = []
    for step in range(25):
        dealt = sampler.next_indices(
            num_groups + partial.extra_prompts - len(carried), excluded=[e.question for e in carried]
        )
        in_play = carried + [
            Entry(begun=step, index=index, question=question, engine=0)
            for index, question in enumerate(dealt)
        ]
        assert len({e.question for e in in_play}) == len(in_play)
        due = {e.key for e in in_play if is_due(e, step, max_staleness=max_staleness)}
        in_play = with_complete(in_play, due | {e.key for e in in_play if random.random() < luck})
        late = to_finish(in_play, num_groups=num_groups)
        _, carried = select(with_complete(in_play, {e.key for e in late}), num_groups=num_groups)


@given(
    begun=st.lists(st.integers(0, 9), max_size=20),
    step=st.integers(10, 12),
    max_groups=st.integers(0, 20),
    max_staleness=st.integers(1, 12),
    num_engines=st.integers(1, 3),
)
def test_smaller_settings_keep_the_oldest_groups_that_a_step_can_still_train_on(
    begun, step, max_groups, max_staleness, num_engines
):
    entries = [entry(old, i, engine=i % num_engines) for i, old in enumerate(sorted(begun))]
    kept = []
    for engine in range(num_engines):
        own = tuple(group(e.begun, e.index, "") for e in entries if e.engine == engine)
        state = Carried(entries=tuple(entries), own=own)
        found = bounded(state, step, max_groups=max_groups, max_staleness=max_staleness)
        assert [g.key for g in found.own] == [e.key for e in found.entries if e.engine == engine]
        kept.append(found.entries)
    assert all(other == kept[0] for other in kept)
    allowed = [e for e in entries if e.begun >= step - max_staleness]
    assert list(kept[0]) == allowed[:max_groups]


@given(st.integers(0, 30), st.integers(1, 5))
def test_new_prompts_go_round_the_engines_where_nothing_is_carried(count, num_engines):
    assert engines_for([], count, num_engines=num_engines) == [i % num_engines for i in range(count)]


def test_an_engine_that_carries_more_begins_less():
    held = [entry(0, 0), entry(0, 1), entry(0, 2, complete=True, engine=1), entry(0, 3, engine=2)]
    assert engines_for(held, 5, num_engines=3) == [1, 1, 2, 0, 1]


def test_taken_trajectories_are_numbered_by_place_and_the_groups_stay_as_they_are():
    groups = [group(2, 1, "answer", "eos"), group(1, 4, "answer", "length"), group(2, 0, "answer", "")]
    taken = [entry(1, 4), entry(1, 5, engine=1), entry(2, 1)]
    found = trajectories_of(groups, taken)
    assert [(t.prompt_index, t.prompt_id, t.sample_index) for t in found] == [
        (0, "q4", 0), (0, "q4", 1), (2, "q1", 0), (2, "q1", 1),
    ]  # fmt: skip
    assert groups[0].trajectories[0].prompt_index == 1


def test_a_group_is_complete_once_all_its_trajectories_have_ended():
    assert group(0, 0, "answer", "eos").is_complete
    assert not group(0, 0, "answer", "").is_complete
    assert not group(0, 0).is_complete


def test_what_is_played_on_is_another_trajectory():
    old = trajectory(0, 0, "")
    before = encode_records(old)
    new = copied(old)
    assert new == old
    new.turns[0].info_gain = 1.0
    new.turns.append(new.turns[0])
    assert encode_records(old) == before


def test_staleness_is_that_of_the_oldest_turn():
    old = trajectory(0, 0, "answer")
    old.turns.append(Turn(tokens=[1], rollout_logprobs=[0.0], version=5))
    assert (old.staleness(5), old.staleness(6)) == (2, 3)


@pytest.fixture
def saved(tmp_path):
    """Two engines' groups in a checkpoint."""
    held = {0: (group(1, 3, "answer", "eos"), group(2, 0, "answer", "")), 1: (group(1, 2, "", ""),)}
    for engine, own in held.items():
        path = tmp_path / carried_file(engine)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(Carried(own=own)))
    return tmp_path, held


def test_each_engine_reads_its_own_groups_and_all_know_of_all(saved):
    folder, held = saved
    for engine in held:
        state = carried(read(folder, num_engines=2), engine=engine)
        assert state.own == held[engine]
        assert state.entries == (
            entry(1, 2, engine=1),
            entry(1, 3, complete=True),
            entry(2, 0),
        )


@pytest.mark.parametrize("num_engines", [1, 3])
def test_another_number_of_engines_shares_the_groups_out(saved, num_engines):
    folder, own_of = saved
    held = read(folder, num_engines=num_engines)
    states = [carried(held, engine=engine) for engine in range(num_engines)]
    expected = sorted((g for own in own_of.values() for g in own), key=lambda g: g.key)
    assert sorted((g for state in states for g in state.own), key=lambda g: g.key) == expected
    assert all(state.entries == states[0].entries for state in states)
    for engine, state in enumerate(states):
        assert [e.key for e in state.entries if e.engine == engine] == [g.key for g in state.own]


def test_a_checkpoint_without_such_files_carries_nothing(tmp_path):
    assert carried(read(tmp_path, num_engines=2), engine=0) == Carried()


def test_groups_of_release_0_1_are_read(saved):
    """Release 0.1 named the files by replica, and called the version of a turn its step."""
    folder, _ = saved
    expected = read(folder, num_engines=2)
    for path in (folder / "carried").iterdir():
        groups = msgspec.msgpack.decode(path.read_bytes())
        for turn in (
            turn for group in groups for member in group["trajectories"] for turn in member["turns"]
        ):
            turn["step"] = turn.pop("version")
        path.with_name(path.name.replace("engine", "replica")).write_bytes(msgspec.msgpack.encode(groups))
        path.unlink()
    assert read(folder, num_engines=2) == expected


def test_a_file_of_something_else_is_refused_in_one_line(saved):
    folder, _ = saved
    (folder / carried_file(1)).write_bytes(msgspec.msgpack.encode([{"begun": "soon"}]))
    with pytest.raises(ValueError, match=r"engine_1\.bin was not written by this program$"):
        read(folder, num_engines=2)


def searching(num_turns: int, reason: str) -> Trajectory:
    """Turns of 10 sampled tokens and 30 of observation; the last has no observation if there is a `reason`."""
    turns = [
        Turn(
            tokens=[5] * 10,
            rollout_logprobs=[-0.1] * 10,
            observation_tokens=[7] * 30,
            calls=[Call(tool="search", arguments="x")],
        )
        for _ in range(num_turns)
    ]
    if reason:
        turns.append(Turn(tokens=[6] * 10, rollout_logprobs=[-0.1] * 10))
    return Trajectory(
        prompt_index=0, prompt_id="q", sample_index=0, prompt_tokens=[1, 2], turns=turns, stop_reason=reason
    )


@pytest.mark.parametrize(
    ("num_turns", "reason", "limits", "left"),
    [
        (3, "", {}, None),
        (3, "answer", {}, None),
        (3, "", {"max_turns": 3}, None),
        (3, "", {"max_turns": 2}, 2),
        (3, "answer", {"max_turns": 2}, 2),
        (3, "", {"max_response_tokens": 120 + MIN_TURN_TOKENS}, None),
        (3, "", {"max_response_tokens": 119 + MIN_TURN_TOKENS}, 2),
        (3, "answer", {"max_response_tokens": 130}, None),
        (3, "answer", {"max_response_tokens": 129}, 2),
        (3, "", {"max_response_tokens": 71}, 0),
        (3, "", {"max_model_len": 2 + 80 + MIN_TURN_TOKENS}, 2),
    ],
)
def test_carried_trajectories_past_smaller_budgets_are_cut_back(num_turns, reason, limits, left):
    whole = dict(max_turns=6, max_turn_tokens=99, max_response_tokens=999, max_model_len=9999)
    member = searching(num_turns, reason)
    before = group(1, 0, "")
    before = CarriedGroup(begun=1, question=0, prompt=before.prompt, trajectories=[member])
    after = shortened(before, Limits(**{**whole, **limits}))
    if left is None:
        assert after is before
        return
    (cut,) = after.trajectories
    assert cut.turns == member.turns[:left] and cut.stop_reason == "" and not after.is_complete
    assert len(member.turns) == num_turns + bool(reason), "the group that was held has changed"
