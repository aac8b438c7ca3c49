"""Compare the layers' CPU twin with Transformer Engine's real modules: names, shapes, dtypes, splits, weight
tables.
"""

from __future__ import annotations

import json

import pytest
import torch
from te_reference import FOLDER
from test_transformer_engine import run_worker
from tiny_models import ARCHITECTURES, build_model

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not FOLDER.is_dir(), reason="Transformer Engine's wheels are in the second leg (make test-py312)"
    ),
]

RECIPES = {
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The results of two ranks, from one launch."""
    folder = tmp_path_factory.mktemp("names")
    for number, architecture in enumerate(ARCHITECTURES):
        model = build_model(architecture, vocab_size=250, tied=number == 0)
        model.to(torch.bfloat16).save_pretrained(folder / architecture)
    run_worker("te_names_worker.py", str(folder), str(folder / "found.json"))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_twin_has_transformer_engines_parameters(found: dict, architecture: str, tensor: int) -> None:
    for mine, theirs in found["names"][f"{architecture}-tp{tensor}"]:
        assert mine == theirs
        assert len(mine) >= 2 * 6 + 2  # six parameters of each layer, the embedding and the final norm


def test_tensor_parallel_ranks_hold_half_of_what_is_split(found: dict) -> None:
    whole, half = (found["names"][f"qwen3-tp{tensor}"][0][1] for tensor in (1, 2))
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert whole[name][0][0] == 2 * half[name][0][0] and half[name][2] == [True, 0]


@pytest.mark.parametrize(("layout", "num_experts"), [("tp1", 8), ("tp2", 8), ("ep2", 4), ("tp2-ep2", 4)])
def test_experts_are_whole_and_shared_out_in_transformer_engines_grouped_linears(
    found: dict, layout: str, num_experts: int
) -> None:
    for mine, theirs in found["names"][f"qwen3_moe-{layout}"]:
        assert mine == theirs
        experts = {name: value for name, value in theirs.items() if ".layers.0.mlp.experts." in name}
        stem = "decoder.layers.0.mlp.experts.linear_fc"
        assert sorted(experts) == sorted(
            f"{stem}{number}.weight{expert}" for number in (1, 2) for expert in range(num_experts)
        )
        # gate and up map 64 channels to 32 each, and down maps back. Tensor parallelism divides none of them.
        assert all(
            value[0] == ([64, 64] if "linear_fc1" in name else [64, 32]) for name, value in experts.items()
        )


@pytest.mark.parametrize("number_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_transformer_engine_is_given_the_recipe_that_was_asked_for(
    found: dict, recipe: str, number_format: str
) -> None:
    assert found["recipes"][f"{recipe}-{number_format}"] == [RECIPES[recipe], number_format.upper()]
