import math
import multiprocessing
import queue
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from a2tgpo.metrics.reduce import MetricSums


def filled(rank):
    """Return sums with the metrics that `rank` adds: other names on each rank, and none on rank 1."""
    sums = MetricSums()
    if rank == 0:
        sums.add("reward/mean", 3.0, 4)
        sums.add("stop/length", 2, 0)
        sums.add("gain/turn_1_mean", 0.0, 0)
        sums.add_max("ratio/max", 1.5)
        sums.add_min("ratio/min", 0.5)
    elif rank == 2:
        sums.add("reward/mean", 1.0, 1)
        sums.add("stop/length", 5, 0)
        sums.add("stop/answer", 1, 0)
        sums.add_max("ratio/max", -7.0)
        sums.add_min("ratio/min", -7.0)
    return sums


EXPECTED = {
    "gain/turn_1_mean": 0.0,
    "ratio/max": 1.5,
    "ratio/min": -7.0,
    "reward/mean": 0.8,
    "stop/answer": 1.0,
    "stop/length": 7.0,
}


def test_one_process_needs_no_group():
    sums = filled(0)
    sums.merge(filled(1))
    sums.merge(filled(2))
    assert sums.reduce() == EXPECTED
    assert list(sums.reduce()) == sorted(EXPECTED)


def test_small_terms_survive_beside_large_ones():
    sums = MetricSums()
    for _ in range(1000):
        sums.add("loss", 1e-9, 1)
    sums.add("loss", 1.0, 0)
    assert sums.values()["loss"] == pytest.approx((1.0 + 1e-6) / 1000, rel=1e-12)


def test_nan_is_reported_not_hidden():
    sums = MetricSums()
    for value in (1.0, math.nan, 2.0):
        sums.add_max("max", value)
        sums.add_min("min", value)
    assert math.isnan(sums.values()["max"])
    assert math.isnan(sums.values()["min"])


def test_name_used_in_two_ways_is_refused():
    sums = filled(0)
    sums.add_max("reward/mean", 1.0)
    with pytest.raises(ValueError, match="'reward/mean' was added both"):
        sums.values()


def reduce_on_rank(rank, port, results):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3, timeout=timedelta(seconds=60)
    )
    pair = dist.new_group([0, 1])
    sums = filled(rank)
    everyone = sums.reduce()
    again = sums.reduce(dist.group.WORLD)
    in_pair = sums.reduce(pair) if rank < 2 else {}
    results.put((rank, everyone, again, in_pair))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_with_other_names_or_none_all_get_the_same_numbers():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=reduce_on_rank, args=(rank, port, results)) for rank in range(3)]
    for process in ranks:
        process.start()
    try:
        reports = sorted(results.get(timeout=90) for _ in ranks)
    except queue.Empty:
        pytest.fail("a rank did not finish")
    finally:
        for process in ranks:
            process.join(30)
            if process.is_alive():
                process.kill()
    for rank, everyone, again, in_pair in reports:
        assert everyone == again == EXPECTED, rank
        assert in_pair == (filled(0).values() if rank < 2 else {})
