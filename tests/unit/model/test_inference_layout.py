"""The layout in which the processes of one machine play or convert a saved model."""

import dataclasses
from types import SimpleNamespace

import pytest

from a2tgpo.config.load import load_config, overridden_keys
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.inference_layout import UNDIVIDED, inference_config

SIZES = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 29568}
QWEN_72B = SimpleNamespace(
    model_type="qwen2", num_attention_heads=64, num_key_value_heads=8, head_dim=128, **SIZES
)
QWEN_30B_A3B = SimpleNamespace(
    model_type="qwen3_moe", num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
    num_hidden_layers=48, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
)  # fmt: skip


def laid_out(name, hf_config, world_size, *overrides):
    config = load_config(f"configs/{name}.yaml", [*UNDIVIDED, *overrides])
    return inference_config(config, hf_config, world_size=world_size, explicit=overridden_keys(overrides))


def divided(config):
    parallel = config.parallel
    return parallel.tensor, parallel.expert, parallel.pipeline, config.rollout.tensor_parallel


def test_a_72b_run_of_64_ranks_is_played_by_the_8_of_one_node():
    config = laid_out("train_70b", QWEN_72B, 8)
    assert divided(config) == (8, 1, 1, 8)
    assert not config.model.fp8.enabled and not config.parallel.sequence


def test_a_mixture_of_128_experts_is_played_by_the_8_ranks_of_one_node():
    config = laid_out("train_30b_a3b", QWEN_30B_A3B, 8)
    assert divided(config) == (4, 8, 1, 4)  # 4 key-value heads: two data-parallel replicas, two engines
    assert config.parallel.sequence and not config.rollout.router_replay


@pytest.mark.parametrize(
    ("world_size", "expected"), [(1, (1, 1, 1, 1)), (2, (2, 1, 1, 2)), (6, (2, 1, 1, 2))]
)
def test_fewer_processes_than_the_engine_had_take_the_largest_size_that_divides(world_size, expected):
    assert divided(laid_out("train_70b", QWEN_72B, world_size)) == expected


def test_what_the_command_line_sets_stays_and_the_rest_is_chosen_around_it():
    assert divided(laid_out("train_70b", QWEN_72B, 8, "parallel.pipeline=2")) == (4, 1, 2, 8)
    config = laid_out("train_70b", QWEN_72B, 8, "parallel.tensor=2", "rollout.tensor_parallel=4")
    assert divided(config) == (2, 1, 1, 4)
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 3; allowed: a divisor of the model's 64"):
        laid_out("train_70b", QWEN_72B, 3, "parallel.tensor=3")


def test_an_engine_on_a_gpu_takes_the_memory_that_no_optimizer_needs(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    rollout = laid_out("train_70b", QWEN_72B, 8).rollout
    assert (rollout.gpu_memory_fraction, rollout.kv_cache_gib) == (0.85, 0.0)
    rollout = laid_out("train_70b", QWEN_72B, 8, "rollout.gpu_memory_fraction=0.5").rollout
    assert (rollout.gpu_memory_fraction, rollout.kv_cache_gib) == (0.5, 0.0)
    rollout = laid_out("train_70b", QWEN_72B, 8, "rollout.kv_cache_gib=9").rollout
    assert rollout.kv_cache_gib == 9


def test_fewer_ranks_without_a_gpu_hold_the_cache_that_more_held_together(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = load_config("configs/train_70b.yaml", [*UNDIVIDED, "rollout.kv_cache_gib=2.5"])
    assert inference_config(config, QWEN_72B, world_size=2).rollout.kv_cache_gib == 4 * 2.5


def test_everything_else_is_the_runs():
    run, config = load_config("configs/train_70b.yaml"), laid_out("train_70b", QWEN_72B, 8)
    for name in ("run", "data", "tools", "search", "algorithm", "evaluation"):
        assert getattr(config, name) == getattr(run, name)
    same = {"tensor_parallel", "gpu_memory_fraction", "kv_cache_gib"}
    kept = {field.name for field in dataclasses.fields(run.rollout)} - same
    assert all(getattr(config.rollout, name) == getattr(run.rollout, name) for name in kept)
