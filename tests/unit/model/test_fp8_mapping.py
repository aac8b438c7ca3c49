"""FP8 settings as Megatron receives them, and the layouts and machines that are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import Fp8Recipe
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from a2tgpo.config.fp8 import TOKEN_MULTIPLES, Fp8Config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model import build
from a2tgpo.model import transformer_config as module
from a2tgpo.model.build import build_policy
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.precision import FP8_NEEDS, require_fp8_needs, require_number_formats
from a2tgpo.model.transformer_config import check_layout, transformer_config
from a2tgpo.parallel.groups import ParallelGroups

Checkpoint = Callable[..., Path]
FIELDS = {field.name: field for field in dataclasses.fields(TransformerConfig)}


@pytest.fixture(autouse=True)
def no_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn fused kernels off: without Transformer Engine, Megatron refuses some of them but does not refuse FP8."""
    plain = module._fusions(False)
    monkeypatch.setattr(module, "_fusions", lambda transformer_engine: plain)


def built(path: Path, fp8: Fp8Config, *, transformer_engine: bool = True) -> TransformerConfig:
    model = ModelConfig(path=str(path), fp8=fp8)
    return transformer_config(
        load_hf_config(model.path), model, ParallelConfig(), transformer_engine=transformer_engine
    )


@pytest.mark.parametrize("number_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", list(TOKEN_MULTIPLES))
def test_every_setting_reaches_the_field_that_megatron_reads(
    number_format: str, recipe: str, checkpoint: Checkpoint
) -> None:
    config = built(checkpoint(), Fp8Config(format=number_format, recipe=recipe, first_layers_bf16=1))
    # The value must be one that Megatron knows, because Megatron does not check it.
    assert config.fp8 in literals("fp8")
    assert config.fp8_recipe in literals("fp8_recipe")
    assert Fp8Recipe(config.fp8_recipe).value == recipe
    expected = {
        "fp8": number_format,
        "fp8_recipe": recipe,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 0,
    }
    assert expected.keys() <= FIELDS.keys()
    plain = built(checkpoint(), Fp8Config())
    for name in FIELDS:
        # Functions that are made per instance compare by identity, so they are skipped.
        if not callable(getattr(plain, name)):
            assert getattr(config, name) == expected.get(name, getattr(plain, name)), name


def literals(name: str) -> set[str]:
    """Return the texts that the annotation of this TransformerConfig field allows."""
    hint = get_type_hints(TransformerConfig)[name]
    (choices,) = (part for part in get_args(hint) if getattr(part, "__origin__", None) is Literal)
    return set(get_args(choices))


def test_without_fp8_megatron_has_its_own_defaults(checkpoint: Checkpoint) -> None:
    config = built(checkpoint(), Fp8Config())
    for name, field in FIELDS.items():
        if "fp8" in name or "in_bf16" in name or name == "first_last_layers_bf16":
            assert getattr(config, name) == field.default, name
    assert config.fp8 is None


def test_all_layers_compute_in_fp8_unless_some_are_named(checkpoint: Checkpoint) -> None:
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    def kept(fp8: Fp8Config) -> list[int]:
        config = built(checkpoint(), fp8)
        return [layer for layer in range(config.num_layers) if is_first_last_bf16_layer(config, layer)]

    assert kept(Fp8Config(format="e4m3")) == []
    assert kept(Fp8Config(format="e4m3", first_layers_bf16=1)) == [0]
    assert kept(Fp8Config(format="e4m3", last_layers_bf16=1)) == [1]


def test_weights_stay_bfloat16_for_buffers_and_optimizer() -> None:
    """Options for FP8 weights are off by default in the installed version, and nothing turns them on."""
    assert DistributedDataParallelConfig().fp8_param_gather is False
    assert OptimizerConfig().fp8_recipe is None
    assert FIELDS["fp8_param"].default is False


def test_fp8_without_transformer_engine_is_refused_not_run_in_bfloat16(
    checkpoint: Checkpoint, groups: ParallelGroups
) -> None:
    fp8 = Fp8Config(format="hybrid")
    with pytest.raises(ConfigError, match=r"^model\.fp8\.format is 'hybrid'; allowed here: none, since"):
        built(checkpoint(), fp8, transformer_engine=False)
    if not torch.cuda.is_available():
        model = ModelConfig(path=str(checkpoint("qwen3")), fp8=fp8)
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            build_policy(model, ParallelConfig(), groups, update=None, trainable=False)


def test_float32_under_transformer_engine_is_refused_before_a_model_is_built(
    checkpoint: Checkpoint, groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "uses_transformer_engine", lambda layer_spec: True)
    for parallel in (ParallelConfig(), ParallelConfig(context=2)):
        model = ModelConfig(path=str(checkpoint("qwen3")), dtype="float32")
        with pytest.raises(
            ConfigError, match=r"^model\.dtype is 'float32'; allowed on GPUs: bfloat16, since"
        ):
            build_policy(model, parallel, groups, update=None, trainable=False)
    require_number_formats("bfloat16", Fp8Config())


def layout_fault(path: Path, fp8: Fp8Config, parallel: ParallelConfig, **sizes: int) -> str:
    hf_config: Any = load_hf_config(str(path))
    for name, value in sizes.items():
        setattr(hf_config, name, value)
    check_layout(hf_config, parallel, Fp8Config())  # valid without FP8
    with pytest.raises(ConfigError) as caught:
        check_layout(hf_config, parallel, fp8)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "tensor", "recipe", "what"),
    [
        ({"hidden_size": 72}, 1, "blockwise", "72 hidden channels"),
        ({"intermediate_size": 144}, 2, "tensorwise", "72 feed-forward channels"),
        ({"head_dim": 20, "num_key_value_heads": 4}, 2, "tensorwise", "120 query, key and value channels"),
        ({"head_dim": 4}, 2, "mxfp8", "16 query, key and value channels"),
        # With keys and values these are three blocks of 32 channels, without them one and a half.
        ({"head_dim": 12}, 1, "mxfp8", "48 channels of attention heads"),
    ],
)
def test_a_rank_must_hold_channels_that_fp8_can_take(
    sizes: dict[str, int], tensor: int, recipe: str, what: str, checkpoint: Checkpoint
) -> None:
    """The checkpoint has 4 heads of 32, 2 key-value heads, 64 hidden and 128 feed-forward channels."""
    fp8 = Fp8Config(format="e4m3", recipe=recipe)
    parallel = ParallelConfig(tensor=tensor)
    message = layout_fault(checkpoint(), fp8, parallel, **sizes)
    assert f"a rank has {what}" in message and f"parallel.tensor is {tensor}" in message
    check_layout(load_hf_config(str(checkpoint())), parallel, fp8)


def test_layers_kept_in_bfloat16_must_leave_some_and_fit_a_stage(checkpoint: Checkpoint) -> None:
    whole, staged = ParallelConfig(), ParallelConfig(pipeline=2)
    assert "sum to 2; allowed: less than the model's 2 layers" in layout_fault(
        checkpoint(), Fp8Config(format="e4m3", first_layers_bf16=1, last_layers_bf16=1), whole
    )
    fp8 = Fp8Config(format="e4m3", last_layers_bf16=3)
    assert (
        "model.fp8.last_layers_bf16 is 3; allowed: at most 2, since the stages have [2, 2] of"
        in layout_fault(checkpoint(), fp8, staged, num_hidden_layers=4)
    )
    uneven = ParallelConfig(pipeline=2, last_stage_layers=1)
    fp8 = Fp8Config(format="e4m3", last_layers_bf16=2)
    assert "last_layers_bf16 is 2; allowed: at most 1, since the stages have [3, 1] of" in layout_fault(
        checkpoint(), fp8, uneven, num_hidden_layers=4
    )
    check_layout(load_hf_config(str(checkpoint())), staged, Fp8Config(format="e4m3", last_layers_bf16=1))


def test_old_software_and_cards_are_named() -> None:
    assert FP8_NEEDS.keys() == TOKEN_MULTIPLES.keys()

    def fault(recipe: str, **has: Any) -> str:
        new = {"engine": "2.20.2", "capability": (10, 0), "cuda": "13.0"}
        require_fp8_needs(recipe, **new)
        with pytest.raises(ConfigError) as caught:
            require_fp8_needs(recipe, **(new | has))
        return str(caught.value)

    assert "compute capability 9.0, but needs >= 10.0 and < 12.0" in fault("mxfp8", capability=(9, 0))
    assert "compute capability 12.0, but needs" in fault("mxfp8", capability=(12, 0))
    assert "compute capability 8.9, but needs >= 9.0;" in fault("blockwise", capability=(8, 9))
    assert "compute capability 8.0, but needs >= 8.9;" in fault("tensorwise", capability=(8, 0))
    assert "Transformer Engine 2.2.0, but needs >= 2.3" in fault("blockwise", engine="2.2.0")
    assert "Transformer Engine 2.1.0, but needs >= 2.2" in fault("tensorwise", engine="2.1.0")
    assert "CUDA 12.8, but needs >= 12.9" in fault("blockwise", cuda="12.8")
    require_fp8_needs("blockwise", engine="2.20.2+cu13", capability=(9, 0), cuda="12.9")
    require_fp8_needs("tensorwise", engine="2.10", capability=(8, 9), cuda="12.4")
