"""Arguments that vLLM would get on a GPU. These tests have no GPU."""

from types import SimpleNamespace

import pytest

from a2tgpo.config.rollout import GPU_STEP_TOKENS, RolloutConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.rollout import engine_arguments


@pytest.mark.parametrize(("concurrent", "tokens"), [(256, GPU_STEP_TOKENS), (10_000, 10_000)])
def test_a_step_on_a_gpu_takes_more_than_vllm_takes_when_nothing_is_said(
    monkeypatch, tmp_path, concurrent, tokens
):
    from vllm import EngineArgs
    from vllm.config import SchedulerConfig

    monkeypatch.setattr(engine_arguments, "ON_GPU", True)
    arguments = engine_arguments.engine_arguments(
        str(tmp_path),
        SimpleNamespace(),
        RolloutConfig(max_concurrent=concurrent, gpu_memory_fraction=0.6),
        dtype="bfloat16",
        max_model_len=4096,
        seed=0,
    )
    asked = EngineArgs(**arguments)
    assert asked.max_num_batched_tokens == tokens > SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS
    assert asked.max_num_seqs == concurrent


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_key_and_not_vllms_default_decides_on_asynchronous_scheduling(
    monkeypatch, tmp_path, asynchronous
):
    from vllm import EngineArgs

    monkeypatch.setattr(engine_arguments, "ON_GPU", True)
    arguments = engine_arguments.engine_arguments(
        str(tmp_path),
        SimpleNamespace(),
        RolloutConfig(async_scheduling=asynchronous, gpu_memory_fraction=0.6),
        dtype="bfloat16",
        max_model_len=4096,
        seed=0,
    )
    assert EngineArgs(**arguments).async_scheduling is asynchronous


def test_asynchronous_scheduling_without_a_gpu_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match=r"rollout.async_scheduling is True; allowed: false without a visible GPU"
    ):
        engine_arguments.engine_arguments(
            str(tmp_path),
            SimpleNamespace(),
            RolloutConfig(async_scheduling=True, kv_cache_gib=0.1),
            dtype="float32",
            max_model_len=64,
            seed=0,
        )
