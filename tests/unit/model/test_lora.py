"""Adapters in one process, compared with training of all weights and with PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from a2tgpo.batch.packing import Alignment, PackedBatch, pack
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.lora import PROJECTIONS, LoraConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.memory.offload import gradient_tensors, optimizer_tensors
from a2tgpo.model.build import build_policy
from a2tgpo.model.forward import forward_packed
from a2tgpo.model.lora import is_adapter
from a2tgpo.model.policy import Policy
from a2tgpo.model.weights import iterate_hf_weights, save_hf
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.refit.verify import probe_tokens, probe_trajectory
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.train_step import compute_gradients, train_step

VOCAB = 250
UPDATE = UpdateConfig(lr=1e-2, weight_decay=0.0)
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Return a function that writes a random float32 model of an architecture, and returns the model's folder."""

    def save(architecture: str = "qwen3") -> Path:
        folder = tmp_path / architecture
        build_model(architecture, vocab_size=VOCAB, sharpness=2.0).save_pretrained(folder)
        return folder

    return save


def build(path: Path, groups: ParallelGroups, lora: LoraConfig | None = None, **options: Any) -> Policy:
    options = {"dtype": "float32", "lora": lora or LoraConfig(), **options}
    model = ModelConfig(path=str(path), **options)
    return build_policy(model, ParallelConfig(), groups, update=UPDATE)


def batch() -> PackedBatch:
    trajectories = [probe_trajectory(probe_tokens(VOCAB, length)) for length in (30, 17)]
    return pack(trajectories, [0, 1], align=Alignment())


def loss(_number: int, logprobs: Tensor, _entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return -(logprobs * torch.linspace(-1, 1, len(logprobs))).sum(), {}


def train(policy: Policy, *, steps: int = 2) -> Any:
    """Train and return the optimizer. A changes only from the second step on, because B begins as 0."""
    optimizer, _ = build_optimizer(policy, UPDATE, total_steps=steps)
    for _ in range(steps):
        assert train_step(policy, optimizer, [batch()], loss).update_ok
    return optimizer


def scores(policy: Policy) -> Tensor:
    (found,) = compute_logprobs(policy, [batch()])
    assert found is not None
    return found.logprobs


def logits(policy: Policy, tokens: Tensor) -> Tensor:
    length = tokens.size(1)
    with torch.no_grad():
        found = forward_packed(
            policy.chunks[0], tokens, torch.arange(length)[None], torch.tensor([0, length])
        )
    return found[:, :VOCAB]


def test_fresh_adapters_change_no_bit_of_scores_and_weights(save: Save, groups: ParallelGroups) -> None:
    path = save()
    plain, adapted = build(path, groups), build(path, groups, LoraConfig(rank=4))
    assert torch.equal(scores(plain), scores(adapted))
    expected = load_file(path / "model.safetensors")
    found = dict(iterate_hf_weights(adapted))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("qwen2", PROJECTIONS),
        ("qwen3", ("q_proj", "v_proj", "up_proj")),
        ("llama", ("k_proj", "o_proj", "down_proj")),
        ("qwen3_moe", PROJECTIONS),
    ],
)
def test_peft_loads_the_adapters_and_gives_the_trainers_logits(
    save: Save, groups: ParallelGroups, tmp_path: Path, architecture: str, targets: tuple[str, ...]
) -> None:
    import peft

    path, out = save(architecture), tmp_path / "out"
    policy = build(path, groups, LoraConfig(rank=4, alpha=6.0, targets=targets))
    train(policy)
    save_hf(policy, str(out))
    tokens = torch.tensor([probe_tokens(VOCAB, 40)])
    expected = logits(policy, tokens)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert (base(tokens).logits[0] - expected).abs().max() > 0.1, "training changed nothing"
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
        for model in (adapted, merged):
            assert (model(tokens).logits[0] - expected).abs().max() < 2e-5
    loaded = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(loaded) == len(load_file(out / "adapter/adapter_model.safetensors"))
    possible = PROJECTIONS[:4] if architecture == "qwen3_moe" else PROJECTIONS
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == [name for name in possible if name in targets]
    assert len(loaded) == 2 * 2 * len(config["target_modules"])  # two layers, A and B


def test_at_full_rank_the_gradient_is_that_of_all_weights(save: Save, groups: ParallelGroups) -> None:
    """With A = I and B = 0, the gradient of B is the gradient of the weight."""
    path, rank = save(), 128
    full, adapted = build(path, groups), build(path, groups, LoraConfig(rank=rank, alpha=float(rank)))
    assert adapted.adapters is not None
    pairs = [adapter.pair(p) for adapter in adapted.adapters.by_weight.values() for p in adapter.projections]
    for first, _ in pairs:
        first.data.copy_(torch.eye(*first.shape))
    for policy in (full, adapted):
        compute_gradients(policy, [batch()], loss)
    for _, second in pairs:
        second.data.copy_(second.main_grad)  # type: ignore[attr-defined]
    weights = dict(full.gpt_models[0].named_parameters())
    assert len(adapted.adapters.by_weight) == 2 * 4
    for name, adapter in adapted.adapters.by_weight.items():
        expected = weights[name].main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(adapter.delta(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_recomputed_layers_have_the_same_gradients(save: Save, groups: ParallelGroups) -> None:
    path, found = save(), []
    for recompute in ("none", "full"):
        policy = build(path, groups, LoraConfig(rank=4), recompute=recompute)
        compute_gradients(policy, [batch()], loss)
        (gradients,) = gradient_tensors(policy)
        found.append(gradients.clone())
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_only_adapters_are_trained_and_have_optimizer_state(save: Save, groups: ParallelGroups) -> None:
    path = save()
    policy = build(path, groups, LoraConfig(rank=4))
    model = policy.gpt_models[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = train(policy)
    assert set(sizes) == {name for name in before if is_adapter(name)}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_adapter(name), name
    held = sum(tensor.numel() for tensor in optimizer_tensors(policy, optimizer))
    assert held <= 2.1 * sum(
        sizes.values()
    )  # two moments, and padding; float32 weights are their own masters


def test_the_base_is_the_model_before_training(save: Save, groups: ParallelGroups) -> None:
    path = save()
    policy = build(path, groups, LoraConfig(rank=4))
    before = scores(policy)
    train(policy)
    assert torch.equal(scores(policy.base), before)
    assert (scores(policy) - before).abs().max() > 0.01
    expected = load_file(path / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in iterate_hf_weights(policy.base))


def test_bfloat16_weights_are_merged_in_float32_and_rounded_once(save: Save, groups: ParallelGroups) -> None:
    path = save()
    policy = build(path, groups, LoraConfig(rank=4, alpha=8.0, targets=("o_proj",)), dtype="bfloat16")
    train(policy)
    assert policy.adapters is not None
    merged = dict(iterate_hf_weights(policy))
    for adapter in policy.adapters.by_weight.values():
        (projection,) = adapter.projections
        first, second = (parameter.detach().float() for parameter in adapter.pair(projection))
        name = f"{projection.name}.weight"
        weight = load_file(path / "model.safetensors")[name].bfloat16()
        assert torch.equal(merged[name], (weight.float() + 2.0 * (second @ first)).bfloat16())
        assert not torch.equal(merged[name], weight)


def test_adapters_that_cannot_be_are_refused(save: Save, groups: ParallelGroups) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.rank is 4; allowed: 0 with model\.fp8\.format e4m3"):
        ModelConfig(path="m", lora=LoraConfig(rank=4), fp8=Fp8Config(format="e4m3"))
    with pytest.raises(ConfigError, match=r"model\.lora\.targets is 'lm_head'; allowed: q_proj"):
        LoraConfig(targets=("lm_head",))
    with pytest.raises(ConfigError, match="projections in experts, which get no adapters"):
        build(save("qwen3_moe"), groups, LoraConfig(rank=4, targets=("up_proj",)))
