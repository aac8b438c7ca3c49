"""Every supported family: its fields, weight table, layers, engine, plan and page (docs/models.md)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from mbridge.core.bridge import _MODEL_REGISTRY
from tiny_models import ARCHITECTURES, build_model, checkpoint_tensors
from transformers import AutoModelForCausalLM

from a2tgpo.config.families import FAMILIES
from a2tgpo.config.fp8 import LinearSizes
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.model.forward import forward_packed
from a2tgpo.model.weights import iterate_hf_weights
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.plan.dimensions import read_dimensions
from a2tgpo.plan.parameters import stage_parameters

ROOT = Path(__file__).parents[3]
LENGTHS = (30, 18)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def write_model(folder: Path, family: str) -> None:
    """Write a random model whose biases are not 0 and whose norms are not 1, because those values would hide
    errors."""
    model = build_model(family, vocab_size=256)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def policy_of(folder: Path, groups: ParallelGroups) -> Policy:
    model = ModelConfig(path=str(folder), dtype="float32")
    return build_policy(model, ParallelConfig(), groups, update=None, trainable=False)


def test_a_family_computes_as_transformers_and_gives_its_weights_back(
    family: str, tmp_path: Path, groups: ParallelGroups
) -> None:
    write_model(tmp_path, family)
    policy = policy_of(tmp_path, groups)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 256, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    boundaries = torch.tensor([0, LENGTHS[0], sum(LENGTHS)])
    with torch.no_grad():
        positions = torch.arange(sum(LENGTHS))[None]
        logits = forward_packed(policy.chunks[0], tokens, positions, boundaries)[:, :256]
        expected = torch.cat([reference(part).logits[0] for part in tokens.split(LENGTHS, 1)])
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    stored = checkpoint_tensors(reference.state_dict())
    exported = dict(iterate_hf_weights(policy))
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())


def test_a_plan_counts_the_parameters_of_a_family(
    family: str, tmp_path: Path, groups: ParallelGroups
) -> None:
    write_model(tmp_path, family)
    policy = policy_of(tmp_path, groups)
    dimensions = read_dimensions(str(tmp_path))
    planned = stage_parameters(dimensions, ParallelConfig(), 0)
    built = sum(parameter.numel() for parameter in policy.gpt_models[0].parameters())
    assert planned.split + planned.replicated + planned.experts == built
    assert dimensions.linear_sizes == LinearSizes.of(policy.hf_config)


def test_the_engine_and_the_weight_table_know_a_family(family: str) -> None:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed for this Python")
    registry = Path(vllm.origin).parent / "model_executor/models/registry.py"  # importing vllm takes seconds
    _, model_class = ARCHITECTURES[family]
    assert f'"{model_class.__name__}": (' in registry.read_text()
    assert FAMILIES[family].weight_table in _MODEL_REGISTRY


def test_the_page_of_models_and_the_tests_have_a_row_for_each_family() -> None:
    page = (ROOT / "docs/models.md").read_text()
    table = page.split("## Supported families")[1].split("|---|---|---|")[1].split("##")[0]
    assert set(re.findall(r"^\| `(\w+)` ", table, re.MULTILINE)) == FAMILIES.keys() == ARCHITECTURES.keys()
