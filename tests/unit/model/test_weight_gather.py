"""How parameters are divided into buckets, before any communication."""

from types import SimpleNamespace

import torch

from a2tgpo.model.weight_gather import ParameterRecord, buckets

GROUPS = SimpleNamespace(tp_size=2, ep_size=4)


def record(name, size, *, split=False):
    return ParameterRecord(stage=0, name=name, shape=(size,), split_dim=0 if split else None)


def names_of(records, bucket_bytes):
    grouped = buckets(records, GROUPS, dtype=torch.bfloat16, bucket_bytes=bucket_bytes)
    return [[record.name for record in bucket] for bucket in grouped]


def test_buckets_hold_all_parameters_in_order_within_the_bound():
    records = [record(f"w{i}", size) for i, size in enumerate([8, 8, 8, 2, 18, 2])]
    assert names_of(records, 32) == [["w0", "w1"], ["w2", "w3"], ["w4"], ["w5"]]
    assert names_of(records, 0) == [[f"w{i}"] for i in range(6)]
    assert names_of([], 32) == []


def test_a_parameter_counts_with_the_parts_of_all_ranks():
    expert = record("decoder.layers.0.mlp.experts.linear_fc1.weight0", 4)
    whole, split = record("norm", 4), record("qkv", 4, split=True)
    assert [r.num_bytes(GROUPS, torch.bfloat16) for r in (whole, split, expert)] == [8, 16, 32]
    assert names_of([whole, split, whole], 24) == [["norm", "qkv"], ["norm"]]
