import copy
import math
import pickle

import msgspec
import pytest

from a2tgpo.trajectory import (
    Branch,
    Call,
    LogProbs,
    TokenIds,
    Trajectory,
    Turn,
    decode_records,
    encode_records,
    from_dict,
)


def trajectory() -> Trajectory:
    turns = [
        Turn(
            tokens=[5, 151_642],
            rollout_logprobs=[-0.1, -1e-17],
            observation_tokens=(7,),
            calls=[Call(tool="search", arguments="é")],
            info_gain=0.1 + 0.2,
        ),
        Turn(tokens=[8], rollout_logprobs=[-math.inf]),
        Turn(tokens=[], rollout_logprobs=[]),
    ]
    return Trajectory(
        prompt_index=3,
        prompt_id="q",
        sample_index=1,
        prompt_tokens=[1, 2],
        turns=turns,
        stop_reason="answer",
        branch=Branch(parent=0, root=0, owners=(0,)),
    )


def test_tokens_and_log_probs_take_four_bytes_each_whatever_they_are_made_from():
    made = trajectory()
    assert type(made.prompt_tokens) is type(made.turns[0].observation_tokens) is TokenIds
    assert type(made.turns[0].rollout_logprobs) is LogProbs
    assert TokenIds().itemsize == LogProbs().itemsize == 4
    assert made.tokens.tolist() == [1, 2, 5, 151_642, 7, 8] and made.prompt_tokens.tolist() == [1, 2]


@pytest.mark.parametrize(
    "again",
    [
        lambda t: decode_records(encode_records([t]), list[Trajectory])[0],
        lambda t: decode_records(
            msgspec.msgpack.encode(t.to_dict()), Trajectory
        ),  # as earlier versions wrote
        lambda t: from_dict(msgspec.json.decode(msgspec.json.encode(t.to_dict() | {"prompt_text": "?"}))),
        lambda t: pickle.loads(pickle.dumps(t)),
        copy.deepcopy,
    ],
    ids=["bytes", "lists", "json", "pickle", "copy"],
)
def test_a_trajectory_comes_back_with_every_bit(again):
    made = trajectory()
    made.turns[1].rollout_logprobs[0] = -0.25  # JSON has no infinity
    assert again(made) == made


def as_before_calls(turn: dict) -> dict:
    """Return a turn's record as in earlier versions: with one call, and in the first version without `tool`."""
    calls = turn.pop("calls")
    turn |= {"query": calls[0]["arguments"] if calls else None, "tool_failed": bool(calls)}
    del turn["tool"]
    return turn


@pytest.mark.parametrize("pack", [msgspec.json, msgspec.msgpack], ids=["rollouts", "bank"])
def test_a_turn_of_a_version_with_one_call_per_turn_still_opens(pack):
    made = trajectory()
    made.turns[0].calls = [Call(tool="search", arguments="é", failed=True)]
    made.turns[1].rollout_logprobs[0] = -0.25
    old = made.to_dict()
    old["turns"] = [as_before_calls(turn) for turn in old["turns"]]
    content = pack.encode(old)
    again = from_dict(pack.decode(content)) if pack is msgspec.json else decode_records(content, Trajectory)
    assert again == made and [turn.is_process for turn in again.turns] == [True, False, False]


def test_raw_arrays_of_a_version_with_one_call_per_turn_still_open():
    made = trajectory()
    turns = [
        as_before_calls({**vars(t), "calls": [vars(c) for c in t.calls], "tool": None}) for t in made.turns
    ]
    old = [vars(made) | {"turns": turns}]
    assert decode_records(encode_records(old), list[Trajectory])[0].tokens == made.tokens


def test_several_calls_are_recorded_with_the_first_one_beside_them():
    made = trajectory()
    problem = {"problem": "no such tool", "problem_kind": "unknown_tool"}
    made.turns[0].calls = [
        Call(tool="a", arguments="1", failed=True),
        Call(tool="b", arguments="2", **problem),
    ]
    record = made.to_dict()["turns"][0]
    assert (record["tool"], record["query"], record["tool_failed"]) == ("a", "1", False)
    assert from_dict(made.to_dict()) == decode_records(encode_records(made), Trajectory)


def test_an_infinite_log_prob_travels_between_ranks():
    assert decode_records(encode_records(trajectory()), Trajectory) == trajectory()


@pytest.mark.parametrize("tokens", [["a"], [2**40], [1.5], 5, None])
def test_what_are_no_token_ids_is_refused_as_invalid_content(tokens):
    with pytest.raises(msgspec.ValidationError, match="prompt_tokens"):
        from_dict(trajectory().to_dict() | {"prompt_tokens": tokens})


def test_half_an_element_is_refused():
    with pytest.raises(msgspec.DecodeError, match="multiple of item size"):
        decode_records(msgspec.msgpack.encode(bytes(7)), TokenIds)
