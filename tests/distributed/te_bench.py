"""The objects that the checks of te_worker.py use: tiny models, micro-batches, a layout, and both kinds of layers."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron.core.optimizer
import megatron.core.optimizer.distrib_optimizer
import torch
from tiny_models import build_model, build_tokenizer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from a2tgpo.batch.packing import Alignment, PackedBatch, alignment, pack
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.lora import LoraConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model import build, precision
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.initialize import lay_out
from a2tgpo.trajectory import Trajectory, Turn
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.train_step import LossFunction, compute_gradients

# `require_number_formats` refuses float32, because a GPU would run out of memory. The rows here are tiny, and exact
# comparisons need float32.
build.require_number_formats = lambda dtype, fp8: precision.require_number_formats("bfloat16", fp8)

VOCAB = 250
LAYOUTS = {
    "dp2": ParallelConfig(timeout_s=60),
    "tp2": ParallelConfig(tensor=2, timeout_s=60),
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True, timeout_s=60),
    "pp2": ParallelConfig(pipeline=2, timeout_s=60),
    "cp2": ParallelConfig(context=2, timeout_s=60),
    "ep2": ParallelConfig(expert=2, timeout_s=60),
}
NO_FP8 = Fp8Config()
RECIPES = {
    recipe: Fp8Config(format="hybrid", recipe=recipe, first_layers_bf16=1)
    for recipe in ("blockwise", "tensorwise")
}
"""The first of three layers stays in bfloat16."""


@dataclasses.dataclass
class Outcome:
    """The results of a pass over micro-batches on this rank."""

    logits: list[Tensor]
    """One float32 tensor [T, own vocabulary] per micro-batch. Empty if the rank has no output layer."""
    gradients: dict[str, Tensor]
    """float32 gradient of each parameter. Empty after a pass without gradients."""


class Bench:
    """A layout, and policies that are built from Transformer Engine's modules or from their CPU twins."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.parallel = folder, name, LAYOUTS[name]
        self.groups = lay_out(self.parallel, seed=0)

    def policy(
        self,
        *,
        model: str = "dense",
        twin: bool = False,
        dtype: str = "bfloat16",
        fp8: Fp8Config = NO_FP8,
        recompute: str = "none",
        update: UpdateConfig | None = None,
        overlap: bool = False,
        lora: LoraConfig | None = None,
    ) -> Policy:
        """Build a policy. With `overlap`, gradients are reduced in small buckets during the backward pass, as on
        GPUs.
        """
        config = ModelConfig(
            path=str(self.folder / model),
            dtype=dtype,
            layer_spec="cpu" if twin else "transformer_engine",
            fp8=fp8,
            recompute=recompute,
            lora=lora or LoraConfig(),
        )
        update = update or UpdateConfig(distributed_optimizer=False)
        if not overlap:
            return build.build_policy(config, self.parallel, self.groups, update=update)
        policy = build.build_policy(config, self.parallel, self.groups, update=None, trainable=False)
        for chunk in policy.chunks:
            chunk.requires_grad_(True).train()
        build.wrap_for_training(policy, update, overlap=True, bucket_size=100_000)
        assert len(policy.chunks[0].buffers[0].buckets) > 2
        return policy

    def batches(
        self,
        lengths: tuple[int, ...] = (7, 20, 5, 1),
        *,
        count: int = 2,
        seed: int = 0,
        fp8: Fp8Config = NO_FP8,
        align: Alignment | None = None,
    ) -> list[PackedBatch]:
        """Return `count` micro-batches of random sequences with these lengths, aligned as the layout and the number
        format require.

        Each data-parallel replica has different micro-batches. Every position has a target, so log-probs are computed
        everywhere.
        """
        rng = random.Random(f"{seed} {self.groups.dp_rank}")
        align = align or alignment(self.parallel, fp8)
        batches = []
        for _ in range(count):
            rows = [[rng.randrange(VOCAB) for _ in range(length + 1)] for length in lengths]
            batch = pack([_trajectory(row) for row in rows], range(len(rows)), align=align)
            batches.append(dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask)))
        return batches


def save_models(folder: Path) -> None:
    """Write the checkpoints that `Bench.policy` names. Their weights are bfloat16, so a float32 policy is the exact
    reference.
    """
    sizes = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    config = Qwen3Config(
        **sizes, head_dim=32, vocab_size=VOCAB, num_hidden_layers=3, max_position_embeddings=4096
    )
    models = {
        "dense": Qwen3ForCausalLM(config),  # 256 channels: whole blocks of 128 on each of two ranks
        "tied": build_model("qwen3", vocab_size=VOCAB, num_layers=2, tied=True),
        "with_bias": build_model("qwen2", vocab_size=VOCAB, num_layers=3),
        "experts": build_model("qwen3_moe", vocab_size=VOCAB, num_layers=1),
    }
    for name, model in models.items():
        if name == "dense":
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(3.0)  # so that the distributions are not all uniform
        model.to(torch.bfloat16).save_pretrained(folder / name)
        build_tokenizer(VOCAB).save_pretrained(folder / name)


def _trajectory(row: list[int]) -> Trajectory:
    turn = Turn(tokens=row[1:], rollout_logprobs=[0.0] * len(row[1:]))
    return Trajectory(
        prompt_index=0,
        prompt_id="0",
        sample_index=0,
        prompt_tokens=row[:1],
        turns=[turn],
        stop_reason="answer",
    )


def weighted_logprobs(number: int, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss: a random weighting of the log-probs of micro-batch `number`."""
    generator = torch.Generator().manual_seed(number)
    return (torch.randn(logprobs.shape, generator=generator) * logprobs).sum(), {}


def run(policy: Policy, batches: list[PackedBatch], loss: LossFunction = weighted_logprobs) -> Outcome:
    """Run a training pass, as an update does."""
    with _collected_logits(policy) as logits:
        compute_gradients(policy, batches, loss)
    return Outcome(logits, gradients(policy))


def run_scoring(policy: Policy, batches: list[PackedBatch]) -> Outcome:
    """Run a pass without gradients, as before an update."""
    with _collected_logits(policy) as logits:
        compute_logprobs(policy, batches)
    return Outcome(logits, {})


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Return copies of the gradients in the gradient buffers, by trained parameter."""
    named = [item for gpt in policy.gpt_models for item in gpt.named_parameters() if item[1].requires_grad]
    return {name: parameter.main_grad.clone() for name, parameter in named}


def parameters(policy: Policy) -> dict[str, Tensor]:
    named = [item for gpt in policy.gpt_models for item in gpt.named_parameters()]
    return {name: parameter.detach().clone() for name, parameter in named}


@contextlib.contextmanager
def _collected_logits(policy: Policy) -> Iterator[list[Tensor]]:
    logits: list[Tensor] = []
    layers = [gpt.output_layer for gpt in policy.gpt_models if gpt.post_process]
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, output: logits.append(output[0].detach().float()))
        for layer in layers
    ]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def disturb(policy: Policy, seed: int) -> None:
    """Change all weights, as an update would. Equal seeds give equal changes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `expected`."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def errors(found: Outcome, expected: Outcome) -> tuple[float, float]:
    """Return the largest error of a micro-batch's logits, and the largest error of a parameter's gradient."""
    assert found.gradients.keys() == expected.gradients.keys()
    assert len(found.logits) == len(expected.logits)
    logits = [error(a, b) for a, b in zip(found.logits, expected.logits, strict=True)]
    of_gradients = [error(found.gradients[name], value) for name, value in expected.gradients.items()]
    return max(logits, default=0.0), max(of_gradients, default=0.0)


def assert_equal(found: Outcome, expected: Outcome, what: str = "") -> None:
    """Check that both outcomes are equal to the bit."""
    assert found.gradients.keys() == expected.gradients.keys()
    for number, (a, b) in enumerate(zip(found.logits, expected.logits, strict=True)):
        assert torch.equal(a, b), f"{what} logits of micro-batch {number} differ by {error(a, b):.1e}"
    for name, value in expected.gradients.items():
        got = found.gradients[name]
        assert torch.equal(got, value), f"{what} gradient of {name} differs by {error(got, value):.1e}"


@contextlib.contextmanager
def using_adam(adam: Any) -> Iterator[None]:
    """In the `with` block, Megatron's optimizers use the class `adam`."""
    modules: Any = (megatron.core.optimizer, megatron.core.optimizer.distrib_optimizer)
    before = [module.Adam for module in modules]
    for module in modules:
        module.Adam = adam
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            module.Adam = kept
