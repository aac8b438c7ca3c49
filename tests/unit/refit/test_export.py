"""Buckets of weights."""

import weakref

import torch

from a2tgpo.refit.export import buckets


def weights(sizes, alive=None):
    """Float32 tensors of these numbers of elements; `alive` collects weak references to them."""
    for i, size in enumerate(sizes):
        tensor = torch.full((size,), float(i))
        if alive is not None:
            alive.append(weakref.ref(tensor))
        yield f"w{i}", tensor
        del tensor


def test_buckets_hold_all_weights_in_order_within_the_bound():
    got = [[name for name, _ in bucket] for bucket in buckets(weights([4, 4, 4, 1, 9, 1]), bucket_bytes=32)]
    assert got == [["w0", "w1"], ["w2", "w3"], ["w4"], ["w5"]]


def test_no_weights_give_no_bucket():
    assert list(buckets(iter(()), bucket_bytes=8)) == []


def test_dropped_buckets_are_not_kept_alive():
    alive, peak = [], 0
    for bucket in buckets(weights([4] * 12, alive), bucket_bytes=32):
        peak = max(peak, sum(reference() is not None for reference in alive))
        bucket.clear()
    assert len(alive) == 12
    assert peak <= 3, "a bucket of two, and the tensor that did not fit into it"
