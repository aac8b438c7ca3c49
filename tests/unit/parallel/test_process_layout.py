"""parallel/groups.py, initialize.py, collectives.py and rng.py in a world of one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.parallel.collectives import (
    all_gather_object,
    all_reduce_sum,
    broadcast_bytes,
    broadcast_object,
    gather_object,
    send_bytes,
)
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.parallel.initialize import check_layout, initialize, lay_out, shutdown


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    environment = dict(os.environ)
    yield initialize(ParallelConfig(), seed=11)
    shutdown()
    shutdown()  # a second call has no effect
    os.environ.clear()
    os.environ.update(environment)


def record(rank: int, *, tp: int, dp: int, pp: int, cp: int = 1) -> ParallelGroups:
    """Return the record of `rank` without process groups."""
    group: Any = None
    return ParallelGroups(
        rank=rank,
        world_size=tp * cp * dp * pp,
        local_rank=rank,
        device=torch.device("cpu"),
        tp_rank=rank % tp,
        tp_size=tp,
        tp_group=group,
        cp_rank=rank // tp % cp,
        cp_size=cp,
        cp_group=group,
        pp_rank=rank // (tp * cp * dp),
        pp_size=pp,
        pp_group=group,
        dp_rank=rank // (tp * cp) % dp,
        dp_size=dp,
        dp_group=group,
        dp_cp_group=group,
        ep_rank=0,
        ep_size=1,
        ep_group=group,
        edp_group=group,
    )


def test_replicas_are_made_of_neighbours_within_a_stage() -> None:
    one = record(0, tp=2, dp=3, pp=2)
    assert [one.dp_ranks_of(i) for i in range(3)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert [one.dp_index_of(rank) for rank in range(12)] == [0, 0, 1, 1, 2, 2] * 2


def test_context_parallel_ranks_belong_to_one_replica() -> None:
    one = record(0, tp=2, cp=2, dp=2, pp=2)
    assert [one.dp_ranks_of(i) for i in range(2)] == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13, 14, 15],
    ]
    assert [one.dp_index_of(rank) for rank in range(8)] == [0] * 4 + [1] * 4
    assert [one.cp_rank_of(rank) for rank in range(8)] == [0, 0, 1, 1] * 2
    assert [rank for rank in range(16) if record(rank, tp=2, cp=2, dp=2, pp=2).is_replica_first] == [0, 4]


def test_pipeline_ends_are_known() -> None:
    ends = [
        (r.is_pipeline_first, r.is_pipeline_last) for r in (record(i, tp=1, dp=1, pp=3) for i in range(3))
    ]
    assert ends == [(True, False), (False, False), (False, True)]


def test_layout_must_divide_the_processes() -> None:
    check_layout(ParallelConfig(tensor=2, pipeline=2), 8)
    with pytest.raises(
        ConfigError, match=r"= 4 does not divide the 6 processes started; start a multiple of 4$"
    ):
        check_layout(ParallelConfig(tensor=2, pipeline=2), 6)
    with pytest.raises(ConfigError, match=r"parallel.context \(3\) .* = 6 does not divide the 8 processes"):
        check_layout(ParallelConfig(tensor=2, context=3), 8)


def test_expert_ranks_must_divide_a_stage() -> None:
    check_layout(ParallelConfig(tensor=2, pipeline=2, sequence=True, expert=4), 8)
    with pytest.raises(ConfigError) as caught:
        check_layout(ParallelConfig(pipeline=2, expert=4), 12)
    assert str(caught.value) == (
        "parallel.expert is 4; allowed: a divisor of the 6 ranks of a pipeline stage "
        "(parallel.tensor 1 x parallel.context 1 x 6 data-parallel)"
    )


def test_a_process_without_a_launcher_is_alone(groups: ParallelGroups) -> None:
    assert (groups.world_size, groups.tp_size, groups.pp_size, groups.dp_size) == (1, 1, 1, 1)
    assert groups.is_pipeline_first and groups.is_pipeline_last and groups.dp_ranks_of(0) == [0]


def test_all_reduce_leaves_its_input_alone(groups: ParallelGroups) -> None:
    value = torch.arange(3.0)
    total = all_reduce_sum(value, groups.dp_group)
    total += 1
    assert torch.equal(value, torch.arange(3.0))


def test_objects_and_bytes_come_back(groups: ParallelGroups) -> None:
    assert all_gather_object({"a": 1}, groups.dp_group) == [{"a": 1}]
    assert broadcast_object("x", groups.dp_group, source=0) == "x"
    assert gather_object("x", groups.dp_group) == ["x"]
    assert broadcast_bytes(b"\x00\xff", groups.dp_group) == b"\x00\xff"
    assert send_bytes([b"\x00\xff"], [0], dist.group.WORLD) == [b"\x00\xff"]
    assert send_bytes([], [], dist.group.WORLD) == [b""]
    with pytest.raises(ValueError, match="2 payloads for 1 ranks"):
        send_bytes([b"", b""], [0], dist.group.WORLD)


def test_rng_states_restore_on_a_later_draw(groups: ParallelGroups) -> None:
    from a2tgpo.parallel.rng import get_rng_state, set_rng_state

    state = get_rng_state()
    first = torch.rand(3)
    torch.rand(100)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_a_layout_that_is_left_leaves_no_thread(groups: ParallelGroups) -> None:
    def count_of_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    del groups
    lay_out(ParallelConfig(), seed=11)
    before = count_of_threads()
    for _ in range(3):
        lay_out(ParallelConfig(), seed=11)
    assert count_of_threads() <= before + 2, "a layout has dozens"
