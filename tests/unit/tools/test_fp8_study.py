"""tools/fp8_study/emulation.py compared with torch's FP8 numbers, and tools/fp8_study/study.py on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from emulation import (
    E4M3,
    E5M2,
    RECIPES,
    EmulatedLinear,
    Format,
    Recipe,
    emulated,
    quantise,
    round_to,
)
from hypothesis import given
from hypothesis import strategies as st
from noise import (
    EPSILON,
    WHOLE,
    Written,
    measure,
    noise_rows,
    piece_means,
    statistics,
)
from study import main
from tiny_models import build_model, save_tiny
from torch import Tensor, nn

WIDE = Format(mantissa_bits=23, min_exponent=-100, largest=1024.0)
FORMATS = [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)]


def every_bfloat16() -> Tensor:
    """Return all finite bfloat16 values as float32. They include FP8's subnormals, ties, both zeros and values out of
    range.
    """
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).float()
    return values[values.isfinite()]


@pytest.mark.parametrize(("number_format", "dtype"), FORMATS)
def test_rounding_is_torchs_cast_bit_for_bit(number_format: Format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.cat([every_bfloat16(), torch.randn(50_000) * 2.0 ** torch.randint(-20, 12, (50_000,))])
    expected = values.clamp(-number_format.largest, number_format.largest).to(dtype).float()
    assert torch.equal(round_to(values, number_format).view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("number_format", "dtype"), FORMATS)
def test_one_scale_per_tensor_is_the_current_scaling_formula(
    number_format: Format, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    values = torch.randn(40, 24) * torch.logspace(-3, 3, 24)
    scale = number_format.largest / values.abs().max()
    expected = (values * scale).clamp(-number_format.largest, number_format.largest).to(dtype).float() * (
        1 / scale
    )
    assert torch.equal(quantise(values, number_format, None, power_of_two=False), expected)


@given(
    rows=st.integers(1, 9),
    channels=st.integers(1, 9),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    power_of_two=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_block_is_quantised_as_if_it_were_alone(
    rows: int, channels: int, block: tuple[int, int], power_of_two: bool, seed: int
) -> None:
    """Other blocks have no influence, also on incomplete blocks at the edges."""
    torch.manual_seed(seed)
    values = torch.randn(rows, channels) * 10.0 ** torch.randint(-4, 5, (rows, channels))
    whole = quantise(values, E4M3, block, power_of_two=power_of_two)
    for top in range(0, rows, block[0]):
        for left in range(0, channels, block[1]):
            part = slice(top, top + block[0]), slice(left, left + block[1])
            alone = quantise(values[part].contiguous(), E4M3, None, power_of_two=power_of_two)
            assert torch.equal(whole[part], alone)


def test_a_layer_multiplies_the_quantised_operands() -> None:
    torch.manual_seed(3)
    linear = nn.Linear(200, 72).bfloat16()
    x = torch.randn(2, 5, 200).bfloat16()
    recipe = RECIPES["e4m3-blockwise"]
    rows = quantise(x.float().view(10, 200), E4M3, (1, 128), power_of_two=True)
    weight = quantise(linear.weight.detach().float(), E4M3, (128, 128), power_of_two=True)
    expected = (rows @ weight.T + linear.bias.float()).view(2, 5, 72)
    result = EmulatedLinear(linear, recipe)(x)
    assert result.dtype == torch.bfloat16 and result.shape == (2, 5, 72)
    torch.testing.assert_close(result.float(), expected, rtol=2**-8, atol=1e-5)


def test_emulation_ends_with_its_context_and_spares_the_head() -> None:
    model = build_model("qwen2")
    inside = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with emulated(model.get_decoder(), RECIPES["e5m2-tensorwise"]):
        left = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert left == {"lm_head"}
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == inside


def some_sequences(count: int = 4, length: int = 40) -> list[Written]:
    generator = torch.Generator().manual_seed(0)
    return [
        Written(
            torch.randint(3, 500, (length,), generator=generator).tolist(),
            [(1, length // 2), (length // 2, length)],
        )
        for _ in range(count)
    ]


def test_a_format_with_enough_bits_makes_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "wide", Recipe(WIDE, (1, 128), (128, 128), power_of_two=True))
    model = build_model("qwen3")  # float32, to avoid bfloat16's noise
    sequences = some_sequences()
    results = measure(model, build_model("qwen3"), sequences, ["wide", "e4m3-blockwise"])
    rows = noise_rows(results, results)
    assert {row["format"] for row in rows} >= {"wide", "e4m3-blockwise"}
    for row in rows:
        if row["format"] == "wide":
            assert row["std"] < 1e-6 and row["p95_abs"] < 1e-6  # only from the order of summation
        elif row["format"] == "e4m3-blockwise" and row["question"] != "ratio":
            assert row["p95_abs"] > EPSILON
    assert all(row["p95_abs"] == 0 for row in rows if row["question"] == "ratio")  # the weights did not move


def test_statistics_by_hand() -> None:
    turns = [
        [torch.tensor([0.001, 0.003, 0.008, 0.1], dtype=torch.float64)],
        [torch.tensor([-0.004]).double()],
    ]
    assert piece_means(turns, WHOLE).tolist() == pytest.approx([0.028, -0.004])
    assert piece_means(turns, 1).tolist() == pytest.approx([0.001, 0.003, 0.008, 0.1, -0.004])
    assert piece_means(turns, 3).tolist() == pytest.approx([0.004])
    numbers = statistics(torch.tensor([0.002, -0.004, 0.010, -0.001], dtype=torch.float64))
    assert numbers["count"] == 4 and numbers["mean"] == pytest.approx(0.00175)
    assert numbers["mean_abs"] == pytest.approx(0.00425) and numbers["share_above_epsilon"] == 0.5
    assert numbers["p95_abs"] == pytest.approx(0.0091)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3")


def test_the_study_writes_table_and_figure_and_names_what_it_cannot_read(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"capital of {name}? I need a fact."}) + "\n" for name in "abcdefghij")
    )
    out = tmp_path / "out"
    options = ["--out", str(out), "--recipes", "e4m3-blockwise", "--sample", "24", "--sequences", "8"]
    assert main([folder, str(texts), *options]) == 0
    told = json.loads((out / "noise.json").read_text())
    assert told["study"]["num_turns"] == 8 and told["study"]["num_tokens"] == 8 * 24
    assert {(row["question"], row["format"]) for row in told["rows"]} == {
        ("rounding", "bfloat16"),
        ("rounding", "e4m3-blockwise"),
        ("gap", "e4m3-blockwise"),
        ("ratio", "bfloat16"),
        ("ratio", "e4m3-blockwise"),
        ("ratio", "true ratio"),
    }
    assert len((out / "noise.csv").read_text().splitlines()) == len(told["rows"]) + 1
    assert (out / "noise.png").read_bytes()[:4] == b"\x89PNG"
    assert "e4m3-blockwise" in capsys.readouterr().out

    texts.write_text('{"words": 1}\n')
    assert main([folder, str(texts), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {texts} line 1: no demonstration, rollout or text; give")
    assert error.count("\n") == 1
