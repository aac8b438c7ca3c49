"""`rollout.quantization` sets the engine's arguments and is refused on a machine without FP8."""

import pytest
import torch
from tiny_models import save_tiny

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.rollout.vllm_engine import VllmEngine

FP8 = RolloutConfig(quantization="fp8", kv_cache_gib=0.1)


def open_engine(path: str, *, model_dtype: str) -> VllmEngine:
    return VllmEngine(path, config=FP8, model_dtype=model_dtype, max_model_len=64, seed=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU refuses")
def test_fp8_without_a_gpu_is_refused_before_an_engine_is_built(tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_engine(save_tiny(tmp_path, "qwen3"), model_dtype="bfloat16")
    assert str(caught.value) == (
        "rollout.quantization is 'fp8'; allowed: none without a visible GPU; vLLM has no FP8 layers for CPUs"
    )


def test_the_name_given_to_vllm_is_one_that_quantises_a_full_precision_checkpoint():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.layers.quantization.online.base import _ONLINE_LINEAR_METHODS, _ONLINE_SHORTHANDS

    from a2tgpo.rollout.engine_limits import QUANTIZATION_NAMES

    methods = {}
    for value, name in QUANTIZATION_NAMES.items():
        assert name in QUANTIZATION_METHODS
        methods[value] = _ONLINE_LINEAR_METHODS[_ONLINE_SHORTHANDS[name].linear.weight].__name__
    assert methods == {"fp8": "Fp8PerBlockOnlineLinearMethod", "fp8_per_channel": "Fp8PtpcOnlineLinearMethod"}
