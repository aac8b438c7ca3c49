"""What vLLM is asked for on a GPU, which no test here has."""

from types import SimpleNamespace

import pytest

from a2tgpo.config.rollout import GPU_STEP_TOKENS, RolloutConfig
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
        RolloutConfig(max_concurrent=concurrent),
        dtype="bfloat16",
        max_model_len=4096,
        seed=0,
    )
    asked = EngineArgs(**arguments)
    assert asked.max_num_batched_tokens == tokens > SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS
    assert asked.max_num_seqs == concurrent
