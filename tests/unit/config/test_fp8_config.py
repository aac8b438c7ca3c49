"""The values of `model.fp8` and `rollout.quantization` that are refused in one line, and how a run sets these
keys.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.load import dump_config, load_config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.io.errors import ConfigError

REQUIRED = ["run.name=x", "model.path=m", "data.train=a", "data.test=b", "search.corpus=c"]


def refusal(**fields: object) -> str:
    with pytest.raises(ConfigError) as caught:
        Fp8Config(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(tmp_path: Path, *overrides: str):
    file = tmp_path / "run.yaml"
    file.write_text("{}\n")
    return load_config(file, [*REQUIRED, *overrides])


def test_fp8_is_off_and_asks_for_no_alignment_unless_a_format_is_named() -> None:
    fp8 = Fp8Config()
    assert not fp8.enabled and fp8.token_multiple == fp8.channel_multiple == 1
    assert ModelConfig(path="m").fp8 == fp8


@pytest.mark.parametrize(
    ("recipe", "tokens", "channels"), [("blockwise", 128, 16), ("tensorwise", 16, 16), ("mxfp8", 32, 32)]
)
@pytest.mark.parametrize("number_format", ["hybrid", "e4m3"])
def test_recipes_say_what_they_can_be_given(
    number_format: str, recipe: str, tokens: int, channels: int
) -> None:
    fp8 = Fp8Config(format=number_format, recipe=recipe)
    assert (fp8.token_multiple, fp8.channel_multiple) == (tokens, channels)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("model.fp8.format=foo", "none | hybrid | e4m3"),
        ("model.fp8.format=e5m2", "none | hybrid | e4m3"),
        ("model.fp8.recipe=delayed", "blockwise | tensorwise | mxfp8"),
        ("rollout.quantization=int4", "none | fp8 | fp8_per_channel"),
    ],
)
def test_names_that_megatron_or_vllm_would_take_without_a_word_are_refused(
    tmp_path: Path, override: str, allowed: str
) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, override)
    assert str(caught.value) == f"command line: {key} is {value!r}; allowed: {allowed}"


@pytest.mark.parametrize(
    "field", [{"recipe": "tensorwise"}, {"first_layers_bf16": 1}, {"last_layers_bf16": 2}]
)
def test_settings_of_fp8_without_a_format_are_no_silent_bfloat16_run(field: dict) -> None:
    (name,) = field
    message = refusal(**field)
    assert message.startswith(f"model.fp8.{name} is ") and "set model.fp8.format=hybrid or e4m3" in message
    assert getattr(Fp8Config(format="hybrid", **field), name) == field[name]


def test_weights_kept_in_fp8_and_negative_layer_counts_are_refused() -> None:
    message = refusal(format="e4m3", param_gather=True)
    assert message.startswith(
        "model.fp8.param_gather is True; allowed: false; with FP8 weights the optimizer would"
    )
    assert "docs/fp8.md" in message
    assert refusal(format="e4m3", last_layers_bf16=-1) == "model.fp8.last_layers_bf16 is -1; allowed: >= 0"


def test_fp8_needs_bfloat16_and_transformer_engine() -> None:
    fp8 = Fp8Config(format="hybrid")
    with pytest.raises(
        ConfigError, match=r"^model\.fp8\.format is 'hybrid'; allowed: none with model\.dtype"
    ):
        ModelConfig(path="m", fp8=fp8, dtype="float32")
    with pytest.raises(
        ConfigError, match=r"^model\.fp8\.format is 'hybrid'; allowed: none with model\.layer_spec cpu"
    ):
        ModelConfig(path="m", fp8=fp8, layer_spec="cpu")


def test_a_run_sets_fp8_on_the_command_line_and_says_so_in_its_configuration(tmp_path: Path) -> None:
    config = load(tmp_path, "model.fp8.format=hybrid", "model.fp8.first_layers_bf16=2")
    assert config.model.fp8 == Fp8Config(format="hybrid", first_layers_bf16=2)
    written = tmp_path / "resolved.yaml"
    written.write_text(dump_config(config))
    assert load_config(written) == config


def test_a_quantised_engine_needs_bfloat16_and_a_correction(tmp_path: Path) -> None:
    assert RolloutConfig().quantization == "none"
    with pytest.raises(ConfigError, match=r"none with rollout\.dtype float32$"):
        RolloutConfig(quantization="fp8", dtype="float32")
    with pytest.raises(
        ConfigError, match=r"^command line: rollout\.quantization is 'fp8'; allowed: none without"
    ):
        load(tmp_path, "rollout.quantization=fp8")
    config = load(tmp_path, "rollout.quantization=fp8", "algorithm.correction.kind=truncate")
    assert config.rollout.quantization == "fp8"
