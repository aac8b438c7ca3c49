"""The policy on one process equals transformers, whether packed or not, trained or frozen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.model.forward import forward_packed
from a2tgpo.model.weights import iterate_hf_weights, load_hf_weights, save_hf
from a2tgpo.parallel.groups import ParallelGroups

ROOT = Path(__file__).parents[3]


def build(path: Path, groups: ParallelGroups, **options: str) -> Policy:
    model = ModelConfig(path=str(path), dtype="float32", **options)
    return build_policy(model, ParallelConfig(), groups, update=None, trainable=False)


def forward(policy: Policy, tokens: torch.Tensor, *boundaries: int) -> torch.Tensor:
    with torch.no_grad():
        logits = forward_packed(
            policy.chunks[0], tokens, torch.arange(tokens.size(1))[None], torch.tensor([0, *boundaries])
        )
    return logits[:, : policy.vocab_size]


def random_tokens(length: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def test_smollm2_gives_the_logits_of_transformers_and_its_weights_back(groups: ParallelGroups) -> None:
    path = ROOT / "artifacts" / "models" / "smollm2-135m"
    if not path.exists():
        command = [sys.executable, str(ROOT / "tools" / "prepare_model.py"), "smollm2", "--out", str(path)]
        subprocess.run(command, check=True, timeout=300)
    policy = build(path, groups)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = random_tokens(48, policy.vocab_size)
    logits = forward(policy, tokens, 30, 48)
    with torch.no_grad():
        expected = torch.cat([reference(part).logits[0] for part in tokens.split([30, 18], 1)])
    assert expected.abs().max() > 10
    assert (logits - expected).abs().max() <= 1e-4
    state, names = reference.state_dict(), set()
    for name, tensor in iterate_hf_weights(policy):
        assert torch.equal(tensor, state[name]), name
        names.add(name)
    assert set(state) - names == {"lm_head.weight"}  # tied to the embedding


def test_an_exported_model_has_the_chat_templates_and_settings_of_its_origin(
    checkpoint: Callable[..., Path], groups: ParallelGroups, tmp_path: Path
) -> None:
    path = checkpoint("qwen3")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").write_text('{"top_k": 20}')
    save_hf(build(path, groups), str(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert (tmp_path / "out/generation_config.json").read_text() == '{"top_k": 20}'
    (tmp_path / "own.jinja").write_text("{{ own }}")
    save_hf(build(path, groups), str(tmp_path / "out"), chat_template=str(tmp_path / "own.jinja"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ own }}"


def test_packing_changes_nothing_in_any_sequence(
    checkpoint: Callable[..., Path], groups: ParallelGroups
) -> None:
    policy = build(checkpoint("qwen3"), groups)
    lengths = [3, 17, 1, 9]
    tokens = random_tokens(30, policy.vocab_size)
    packed = forward(policy, tokens, 3, 20, 21, 30)
    alone = torch.cat([forward(policy, part, part.size(1)) for part in tokens.split(lengths, 1)])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    merged = forward(policy, tokens, 30)
    assert (packed[3:] - merged[3:]).abs().max() > 0.05, "the test would not see a segment attend to another"


def test_what_cu_seqlens_leaves_over_is_a_segment_of_its_own(
    checkpoint: Callable[..., Path], groups: ParallelGroups
) -> None:
    policy = build(checkpoint("qwen2"), groups)
    tokens = random_tokens(12, policy.vocab_size)
    assert torch.equal(forward(policy, tokens, 4, 9), forward(policy, tokens, 4, 9, 12))
    assert torch.equal(forward(policy, tokens, 4, 4, 9), forward(policy, tokens, 4, 9)), (
        "empty segments count"
    )


ROPES = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with all its options": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.4,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_gives_the_logits_of_transformers(
    name: str, architecture: str, checkpoint: Callable[..., Path], groups: ParallelGroups
) -> None:
    folder = checkpoint(architecture)
    file = folder / "config.json"
    plain_config = json.loads(file.read_text())
    tokens = random_tokens(200, 250)
    plain = forward(build(folder, groups), tokens, 200)
    # Qwen2.5's model cards give the older spelling, which leaves rope_theta at the top level of the configuration.
    rope = {"type": name.split()[0], **ROPES[name]}
    del plain_config["rope_parameters"]
    file.write_text(json.dumps(plain_config | {"rope_theta": 1e4, "rope_scaling": rope}))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = forward(build(folder, groups), tokens, 200)
    with torch.no_grad():
        expected = reference(tokens).logits[0]
    assert (logits - expected).abs().max() <= 1e-4
    assert (logits - plain).abs().max() > 0.1, "the scaling was not seen"


@pytest.mark.parametrize("normalised", [True, False])
def test_routing_equals_transformers(
    normalised: bool, checkpoint: Callable[..., Path], groups: ParallelGroups
) -> None:
    """The weights of the chosen experts are normalised in one case and not in the other."""
    folder = checkpoint("qwen3_moe", tied=False)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"norm_topk_prob": normalised}))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = build(folder, groups)
    tokens = random_tokens(30, policy.vocab_size)
    with torch.no_grad():
        expected = torch.cat([reference(part).logits[0] for part in tokens.split([29, 1], 1)])
    logits = forward(policy, tokens, 29, 30)
    assert (logits - expected).abs().max() <= 1e-4
    # For a single token, six of the eight experts get no token.
    assert (forward(policy, tokens[:, 29:], 1) - expected[29:]).abs().max() <= 1e-4


def test_inference_mode_is_refused(checkpoint: Callable[..., Path], groups: ParallelGroups) -> None:
    policy = build(checkpoint("llama"), groups)
    with pytest.raises(AssertionError, match="no_grad"), torch.inference_mode():
        forward(policy, random_tokens(4, policy.vocab_size), 4)


def test_export_holds_one_parameter_at_a_time(
    checkpoint: Callable[..., Path], groups: ParallelGroups
) -> None:
    policy = build(checkpoint("llama"), groups)
    weights = iterate_hf_weights(policy)
    assert next(weights)[0] == "model.embed_tokens.weight"
    with torch.no_grad():
        policy.gpt_models[0].decoder.final_layernorm.weight.fill_(7.0)
    assert dict(weights)["model.norm.weight"].unique().tolist() == [7.0], "export ran ahead of its reader"


def test_weights_can_be_loaded_again_into_a_wrapped_policy(
    checkpoint: Callable[..., Path], groups: ParallelGroups
) -> None:
    folder = checkpoint("qwen2")
    model = ModelConfig(path=str(folder), dtype="bfloat16", recompute="selective")
    policy = build_policy(model, ParallelConfig(), groups, update=UpdateConfig())
    wanted = {name: tensor.clone() for name, tensor in iterate_hf_weights(policy)}
    assert wanted["model.norm.weight"].dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            assert parameter.requires_grad
            parameter.zero_()
    load_hf_weights(policy)
    for name, tensor in iterate_hf_weights(policy):
        assert torch.equal(tensor, wanted[name])
