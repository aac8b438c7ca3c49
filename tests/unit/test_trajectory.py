import copy
import math
import pickle

import msgspec
import pytest

from a2tgpo.trajectory import LogProbs, TokenIds, Trajectory, Turn, decode_records, encode_records, from_dict


def trajectory() -> Trajectory:
    turns = [
        Turn(
            tokens=[5, 151_642],
            rollout_logprobs=[-0.1, -1e-17],
            observation_tokens=(7,),
            query="é",
            info_gain=0.1 + 0.2,
        ),
        Turn(tokens=[8], rollout_logprobs=[-math.inf]),
        Turn(tokens=[], rollout_logprobs=[]),
    ]
    return Trajectory(
        prompt_index=3, prompt_id="q", sample_index=1, prompt_tokens=[1, 2], turns=turns, stop_reason="answer"
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


def test_an_infinite_log_prob_travels_between_ranks():
    assert decode_records(encode_records(trajectory()), Trajectory) == trajectory()


@pytest.mark.parametrize("tokens", [["a"], [2**40], [1.5], 5, None])
def test_what_are_no_token_ids_is_refused_as_invalid_content(tokens):
    with pytest.raises(msgspec.ValidationError, match="prompt_tokens"):
        from_dict(trajectory().to_dict() | {"prompt_tokens": tokens})


def test_half_an_element_is_refused():
    with pytest.raises(msgspec.DecodeError, match="multiple of item size"):
        decode_records(msgspec.msgpack.encode(bytes(7)), TokenIds)
