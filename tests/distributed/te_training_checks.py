"""Checks of te_worker.py: gradients over micro-batches, TE's FusedAdam, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from te_bench import (
    NO_FP8,
    RECIPES,
    Bench,
    assert_equal,
    error,
    parameters,
    run,
    using_adam,
)
from torch import Tensor
from transformer_engine.pytorch.optimizers import FusedAdam

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint.writer import CheckpointWriter
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.cpu_adam import CpuFusedAdam
from a2tgpo.update.optimizer import build_optimizer

MICROBATCHES = 8


# -- gradients over micro-batches ----------------------------------------------------------------------------


def check_weight_gradients_add_up_in_float32(bench: Bench) -> None:
    """A matrix's gradient is the exact sum of its micro-batches' products. If each product is rounded first, the sum
    is not exact.
    """
    batches = bench.batches(count=MICROBATCHES)
    found = {}
    for is_fused in (True, False):
        policy = bench.policy()
        if not is_fused:
            _round_each_microbatch(policy)
        layer = policy.gpt_models[0].decoder.layers[1].mlp.linear_fc2
        with _ExactGradient(layer) as exact:
            run(policy, batches)
        # The buffers contain the mean over the replicas, each of which ran different micro-batches.
        torch.distributed.all_reduce(exact.total, group=bench.groups.dp_group)
        found[is_fused] = error(layer.weight.main_grad.double(), exact.total / bench.groups.dp_size)
    assert found[True] < 1e-6, found
    assert found[False] > 1e-3, found


def check_added_gradients_are_nearer_to_float32(bench: Bench) -> None:
    """Summed over all matrices, the errors are smaller than with rounded micro-batches. All bfloat16 micro-batches
    have the same tokens, so only the addition differs.
    """
    batches = bench.batches(count=1) * MICROBATCHES
    outcomes = {}
    for is_fused in (True, False):
        policy = bench.policy()
        if not is_fused:
            _round_each_microbatch(policy)
        outcomes[is_fused] = run(policy, batches, _same_weights)
    truth = run(bench.policy(twin=True, dtype="float32"), batches, _same_weights)
    matrices = [name for name, value in truth.gradients.items() if value.dim() > 1 and ".layers." in name]
    fused, rounded = (
        [error(outcomes[is_fused].gradients[name], truth.gradients[name]) for name in matrices]
        for is_fused in (True, False)
    )
    assert sum(fused) < sum(rounded), (sum(fused), sum(rounded))


def check_added_gradients_are_the_same_in_float32(bench: Bench) -> None:
    """The sums are equal to the bit, with tied embeddings, biases and experts. The first micro-batch may overwrite,
    and the others add.
    """
    for model in {"dp2": ("tied", "with_bias"), "pp2": ("tied",), "ep2": ("experts",)}[bench.name]:
        batches = bench.batches(count=3)
        outcomes = []
        for is_fused in (True, False):
            policy = bench.policy(model=model, dtype="float32")
            policy.transformer_config.moe_permute_fusion = False  # slow in Triton's interpreter
            if not is_fused:
                _round_each_microbatch(policy)
            for _ in range(2):  # a second pass must not use values of the first
                outcome = run(policy, batches)
            outcomes.append(outcome)
        assert_equal(*outcomes, model)


def check_added_gradients_are_reduced_beside_the_computation(bench: Bench) -> None:
    """Each bucket is reduced as soon as the last micro-batch has added to it. The bits are the same as with a
    reduction at the end.
    """
    for fp8 in (NO_FP8, RECIPES["blockwise"]):
        batches = bench.batches((7, 60, 41, 20), count=3, fp8=fp8)
        outcomes = [run(bench.policy(fp8=fp8, overlap=overlap), batches) for overlap in (True, False)]
        assert_equal(*outcomes, fp8.recipe)


def _same_weights(number: int, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(logprobs.shape, generator=generator) * logprobs).sum(), {}


def _round_each_microbatch(policy: Policy) -> None:
    """Let each micro-batch have its own gradient tensor in the weights' dtype, as in layers that Transformer Engine
    builds by default.
    """
    switched = 0
    for chunk in policy.chunks:
        for module in chunk.modules():
            if getattr(module, "fuse_wgrad_accumulation", False):
                module.fuse_wgrad_accumulation = False
                switched += 1
    assert switched, "no layer adds to the buffer"


class _ExactGradient:
    """Sums dy^T x of a linear layer over the micro-batches, in float64."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.inputs, self.total = layer, [], torch.zeros((), dtype=torch.float64)

    def __enter__(self) -> _ExactGradient:
        def keep(_layer: Any, inputs: tuple) -> None:
            self.inputs.append(inputs[0].detach().flatten(0, -2).double())

        def add(_layer: Any, _inputs: tuple, outputs: tuple) -> None:
            self.total = self.total + outputs[0].flatten(0, -2).double().t() @ self.inputs.pop(0)

        self.hooks = [
            self.layer.register_forward_pre_hook(keep),
            self.layer.register_full_backward_hook(add),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


# -- optimizer and checkpoints -------------------------------------------------------------------------------


def check_fused_adam_is_the_cpus(bench: Bench) -> None:
    """Three clipped updates of the distributed optimizer give the same weights, in bfloat16 up to one
    rounding step.
    """
    for dtype, tolerance in (("float32", 2e-6), ("bfloat16", 2**-9)):
        update = UpdateConfig(distributed_optimizer=True, lr=1e-2, weight_decay=0.1, clip_grad=1.0)
        weights, states = [], []
        for adam in (FusedAdam, CpuFusedAdam):
            with using_adam(adam):
                policy = bench.policy(model="tied", dtype=dtype, update=update)
                optimizer, schedule = build_optimizer(policy, update, total_steps=10)
                for number in range(3):
                    _train(bench, policy, optimizer, schedule, number)
                weights.append(parameters(policy))
                inner = optimizer.chained_optimizers[0].optimizer
                assert type(inner) is adam and inner.param_groups[0]["step"] == 3
                states.append(
                    sorted((k, v.dtype) for state in inner.state.values() for k, v in state.items())
                )
        assert states[0] == states[1]
        for name, value in weights[0].items():
            difference = float((value - weights[1][name]).float().abs().max())
            assert difference <= tolerance, (dtype, name, difference)


def check_a_loaded_checkpoint_goes_on_to_the_bit(bench: Bench) -> None:
    """Two steps after a save equal two steps after a load, with FusedAdam, in bfloat16 and in FP8."""
    root = Path(broadcast_object(str(bench.folder / "checkpoints"), torch.distributed.group.WORLD, source=0))
    update = UpdateConfig(distributed_optimizer=True, lr=1e-2)
    for name, options in (("bfloat16", {}), ("fp8", {"fp8": RECIPES["blockwise"]})):

        def build(options: Any = options) -> dict[str, Any]:
            policy = bench.policy(update=update, **options)
            optimizer, schedule = build_optimizer(policy, update, total_steps=6)
            return {"policy": policy, "optimizer": optimizer, "schedule": schedule}

        with using_adam(FusedAdam):
            parts = build()
            for number in range(2):
                _train(bench, **parts, number=number, **options)
            writer = CheckpointWriter(root / name, timeout_s=60)
            writer.start(2, **parts, state={"step": 2}, on_complete=lambda: None)
            assert writer.wait() == ""
            for number in (2, 3):
                _train(bench, **parts, number=number, **options)
            expected = parameters(parts["policy"])
            parts = build()
            checkpoint.load(root / name / "step_2", **parts)
            for number in (2, 3):
                _train(bench, **parts, number=number, **options)
        for key, value in parameters(parts["policy"]).items():
            assert torch.equal(value, expected[key]), f"{name}: {key} differs"


def _train(bench: Bench, policy: Policy, optimizer: Any, schedule: Any, number: int, **options: Any) -> None:
    run(policy, bench.batches((7, 60, 41, 20), seed=number, **options))
    ok, _, _ = optimizer.step()
    assert ok
    optimizer.zero_grad()
    schedule.step()
