"""Rows of experts as bytes, in records and in packed batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.packing import Alignment, empty_batch, pack, packed_length
from a2tgpo.io.errors import ConfigError
from a2tgpo.trajectory import Trajectory, Turn, decode_records, encode_records, from_dict

SHAPE = ExpertShape(layers=3, chosen=2, experts=8)


def rows_of(count: int, *, shape: ExpertShape = SHAPE, seed: int = 0) -> np.ndarray:
    """Return random rows, [count, layers, chosen]."""
    rng = np.random.default_rng(seed)
    return rng.random((count, shape.layers, shape.experts)).argsort(-1)[..., : shape.chosen]


def played(*turns: tuple[int, int], prompt: int = 4, seed: int = 0) -> Trajectory:
    """Return a trajectory. Each turn is (sampled tokens, observed tokens), and has the rows of its own request."""
    held, end, made = 0, prompt, []
    for number, (sampled, observed) in enumerate(turns):
        end += sampled
        turn = Turn(
            tokens=range(sampled), rollout_logprobs=[-1.0] * sampled, observation_tokens=range(observed)
        )
        turn.experts = SHAPE.encode(rows_of(end - 1 - held, seed=10 * seed + number))
        held, end = end - 1, end + observed
        made.append(turn)
    return Trajectory(
        prompt_index=0,
        prompt_id="q",
        sample_index=seed,
        prompt_tokens=range(prompt),
        turns=made,
        stop_reason="answer",
    )


@pytest.mark.parametrize(("experts", "id_bytes"), [(8, 1), (128, 1), (255, 1), (256, 2), (512, 2)])
def test_an_id_takes_one_byte_if_a_further_value_can_mark_a_missing_row(experts, id_bytes) -> None:
    shape = ExpertShape(layers=2, chosen=4, experts=experts)
    rows = rows_of(5, shape=shape)
    assert shape.row_bytes == 2 * 4 * id_bytes and len(shape.encode(rows)) == 5 * shape.row_bytes
    assert (shape.decode(shape.encode(rows.astype(np.uint16))) == rows).all()
    assert shape.no_expert >= experts and np.iinfo(shape.dtype).max >= shape.no_expert


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (np.zeros((4, 2, 2), int), r"rows of shape \(4, 2, 2\), expected \[n, 3, 2\]"),
        (rows_of(4) + 1 + 5 * (rows_of(4) == 7), "expected 0 to 7"),
        (np.zeros((1, 3, 2), int), "names an expert twice"),
    ],
    ids=["shape", "id", "twice"],
)
def test_rows_that_the_model_cannot_have_chosen_are_refused(rows, fault) -> None:
    with pytest.raises(ValueError, match=fault):
        SHAPE.encode(rows)


def test_a_dense_model_has_no_rows() -> None:
    with pytest.raises(
        ConfigError, match=r"rollout.router_replay is true; allowed: false, since a qwen3 model"
    ):
        ExpertShape.of(SimpleNamespace(model_type="qwen3"))


def test_rows_travel_as_bytes_and_stay_out_of_recorded_rollouts() -> None:
    made = played((3, 2), (1, 0))
    (again,) = decode_records(encode_records([made]), list[Trajectory])
    assert again.experts == made.experts and len(made.experts) == packed_length(made) * SHAPE.row_bytes
    assert "experts" not in str(made.to_dict()) and from_dict(made.to_dict()).experts == b""


@pytest.mark.parametrize("align", [Alignment(), Alignment(row=16, segment=4)], ids=["plain", "padded"])
def test_each_position_gets_its_row_and_padding_none(align) -> None:
    trajectories = [played((3, 2), (2, 1), (1, 0), seed=1), played((2, 5), seed=2), played((4, 0), seed=3)]
    trajectories[1].turns[0].experts = b""  # as an engine without replay leaves it
    batch = pack(trajectories, [2, 1, 0], align=align, expert_shape=SHAPE)
    assert batch.experts is not None and batch.experts.dtype == torch.uint8
    expected = torch.full((batch.num_tokens, 3, 2), SHAPE.no_expert, dtype=torch.uint8)
    for place, index in enumerate((2, 1, 0)):
        rows = SHAPE.decode(trajectories[index].experts)
        for position in range(batch.num_tokens):
            if batch.sequence_ids[0, position] == place and len(rows):
                expected[position] = torch.tensor(rows[int(batch.positions[0, position])])
    assert torch.equal(batch.experts, expected)
    assert (expected != SHAPE.no_expert).any(1).any(1).sum() == 12 + 7


def test_without_a_shape_or_without_trajectories_a_batch_has_no_experts() -> None:
    assert pack([played((3, 0))], [0], align=Alignment()).experts is None
    assert empty_batch(Alignment(row=4)).experts is None


def test_a_trajectory_that_lacks_some_of_its_rows_is_an_error() -> None:
    made = played((3, 2), (1, 0))
    made.turns[1].experts = made.turns[1].experts[SHAPE.row_bytes :]
    with pytest.raises(RuntimeError, match="q, sample 0: 8 rows of experts for 9 positions"):
        pack([made], [0], align=Alignment(), expert_shape=SHAPE)
