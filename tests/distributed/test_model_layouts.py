"""On 4 gloo processes the policy equals transformers in every layout, in logits, gradients and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_models import build_model

pytestmark = pytest.mark.distributed

CASES = [
    "qwen2-tp2pp2",
    "qwen3-tp2pp2",
    "llama-tp2pp2",
    "qwen3-tp2pp2sp",
    "qwen2-tp2pp2sp",
    "llama-tp2pp1sp",
    "qwen2-tp1pp4",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The measurements of the worker, from one launch of 4 processes."""
    checkpoints, out = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("out")
    for kind, tied in (("qwen2", True), ("qwen3", False), ("llama", True)):
        # 250 is no multiple of 128, so Megatron pads the vocabulary.
        model = build_model(kind, vocab_size=250, tied=tied, num_layers=4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms begin as ones and biases as zeros, which would hide mistakes
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.to(torch.bfloat16).save_pretrained(checkpoints / kind)
        (checkpoints / kind / "tokenizer.json").write_text("{}")
    run_ranks(4, "model_worker.py", checkpoints, out)
    return json.loads((out / "measured.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_packed_logits_equal_transformers_sequence_by_sequence(measured: dict, case: str) -> None:
    assert 0 < measured[case]["logits_error"] <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_transformers(measured: dict, case: str) -> None:
    assert 0 < measured[case]["grad_error"] <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_export_gives_every_weight_back_to_the_bit(measured: dict, case: str) -> None:
    assert measured[case]["export_exact"] and measured[case]["export_complete"]


@pytest.mark.parametrize("case", CASES)
def test_saved_checkpoint_loads_in_transformers_as_the_same_model(measured: dict, case: str) -> None:
    assert measured[case]["saved_equal"]


def test_bfloat16_logits_stay_bfloat16_and_close_to_transformers(measured: dict) -> None:
    assert measured["bfloat16"]["dtype"] == "torch.bfloat16"
    assert 0 < measured["bfloat16"]["error"] < 0.1
    assert measured["bfloat16"]["export_exact"]


@pytest.mark.parametrize("case", ["padded", "empty slice"])
def test_vocabulary_parallel_logprobs_equal_float64(measured: dict, case: str) -> None:
    assert measured["logprobs"][case] < 1e-5


def test_exchange_delivers_each_payload_to_its_destination_only(measured: dict) -> None:
    # [length, source, destination], by destination and then by source. Rank 2 sent nothing.
    expected = [
        [[0] if s == 2 else [100_000 if (s, d) == (1, 3) else 2 * (1 + d), s, d] for s in range(4)]
        for d in range(4)
    ]
    assert measured["exchange"] == expected


def test_a_missing_tensor_is_refused_in_one_line_on_every_rank(measured: dict) -> None:
    message = measured["refused"]["missing tensor"]
    assert "model.layers.3.mlp.up_proj.weight is missing" in message and "\n" not in message


def test_a_layout_that_does_not_divide_the_processes_is_refused_before_the_start() -> None:
    code = (
        "from a2tgpo.parallel.initialize import initialize\n"
        "from a2tgpo.config.parallel import ParallelConfig\n"
        "initialize(ParallelConfig(tensor=2, pipeline=2), seed=0)"
    )
    environment = {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "6",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    last = process.stderr.strip().splitlines()[-1]
    assert "x parallel.pipeline (2) = 4 does not divide the 6 processes" in last
