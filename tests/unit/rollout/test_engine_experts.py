"""The experts that an engine returns, against transformers. Most of these tests need vLLM's runner for GPUs."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from tiny_models import checkpoint_tensors, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.io.errors import ConfigError

CONFIG = RolloutConfig(kv_cache_gib=0.1, max_concurrent=16, dtype="float32", router_replay=True)
HAS_SECOND_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("moe"), "qwen3_moe")


def chosen_by(path: str, tokens: list[int]) -> np.ndarray:
    """Return the sorted ids of the experts that transformers chooses, [positions, layers, chosen]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(2, -1).indices for layer in logits], 1).sort(-1).values.numpy()


def play(engine, tokens, *, experts_from=0, stop=()):
    """Generate and score at the same time, and return the generation."""
    options = dict(max_tokens=8, seed=5, temperature=1.0, top_p=1.0)
    engine.submit("turn", tokens, stop=stop, experts_from=experts_from, **options)
    engine.submit_score("score", tokens, [5, 6, 7])
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
    return outputs["turn"]


@pytest.mark.skipif(not HAS_SECOND_RUNNER, reason="needs vLLM's runner for GPUs")
def test_turns_bring_the_experts_of_every_position_once_and_a_refit_changes_them(moe_path, tmp_path):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(moe_path, config=CONFIG, model_dtype="float32", max_model_len=256, seed=0)
    shape = ExpertShape.of(AutoConfig.from_pretrained(moe_path))
    tokens = torch.randint(3, 500, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    rows, cached = [], 0
    stops: tuple[str, ...] = ()
    for turn in range(3):
        output = play(engine, tokens, experts_from=sum(map(len, rows)), stop=stops)
        tokens += output.tokens
        rows.append(shape.decode(output.experts))
        cached += output.num_cached_tokens
        assert sum(map(len, rows)) == len(tokens) - 1
        if turn == 1:
            stops = (output.text[:1],)
        tokens += [7 + turn, 9, 11, 200, 201]
    assert cached > 64  # most contexts were not computed again, but their rows are there
    found = np.sort(np.concatenate(rows), -1)
    assert (found == chosen_by(moe_path, tokens)[: len(found)]).all()

    other = save_tiny(tmp_path / "other", "qwen3_moe", seed=3)
    weights = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).state_dict()
    engine.load_weights(checkpoint_tensors(dict(weights)).items(), version=1)
    again = play(engine, tokens)
    found = np.sort(shape.decode(again.experts), -1)
    assert (found == chosen_by(other, tokens + again.tokens)[:-1]).all()
    engine.close()


@pytest.mark.skipif(HAS_SECOND_RUNNER, reason="the runner for GPUs returns experts")
def test_an_engine_that_returns_no_experts_is_refused_in_one_line(moe_path):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    with pytest.raises(
        ConfigError, match=r"^rollout.router_replay is true; allowed: false without a visible GPU"
    ):
        VllmEngine(moe_path, config=CONFIG, model_dtype="float32", max_model_len=256, seed=0)
