"""Checks of te_worker.py: Transformer Engine's modules compared with their CPU twins, and FP8 in different settings.

A check is a function of a `Bench`. It raises AssertionError on the ranks that see a fault.
"""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine_torch as tex
from adapters import fill_adapters
from megatron.core.transformer.module import MegatronModule
from te_bench import (
    RECIPES,
    Bench,
    assert_equal,
    disturb,
    error,
    errors,
    run,
    run_scoring,
)
from torch import Tensor

from a2tgpo.batch.packing import Alignment
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.lora import LoraConfig
from a2tgpo.model import forward
from a2tgpo.model.forward import forward_packed
from a2tgpo.model.policy import Policy

LONG = (7, 60, 41, 20)
"""128 tokens: whole blocks."""


# -- against the twin ----------------------------------------------------------------------------------------


def check_float32_is_the_twin(bench: Bench) -> None:
    """Logits and gradients are equal in float32. Sequence parallelism pads the 33 tokens to 34."""
    _assert_twin(bench, "dense")


def check_float32_is_the_twin_with_tied_embeddings(bench: Bench) -> None:
    _assert_twin(bench, "tied")


def check_float32_is_the_twin_with_biases(bench: Bench) -> None:
    _assert_twin(bench, "with_bias")


def check_float32_is_the_twin_with_experts(bench: Bench) -> None:
    """The results are equal with grouped products, the permutation of tokens in Triton, and the exchange between
    expert-parallel ranks.
    """
    _assert_twin(bench, "experts", lengths=(5, 3))  # the interpreter is slow


def check_float32_is_the_twin_with_adapters(bench: Bench) -> None:
    """Adapters on Transformer Engine's modules equal those on the twins, and recomputation changes no bit."""
    outcomes, batches = [], bench.batches()
    for twin, recompute in ((False, "none"), (True, "none"), (False, "full")):
        policy = bench.policy(twin=twin, recompute=recompute, dtype="float32", lora=LoraConfig(rank=4))
        fill_adapters(policy, spread=0.1)
        outcomes.append(run(policy, batches))
    logits, gradient = errors(*outcomes[:2])
    assert logits <= 2e-6 and gradient <= 5e-6, f"logits {logits:.1e}, gradients {gradient:.1e}"
    assert_equal(outcomes[2], outcomes[0])
    assert all("_lora." in name and value.abs().max() > 0 for name, value in outcomes[0].gradients.items())


def _assert_twin(bench: Bench, model: str, lengths: tuple[int, ...] = (7, 20, 5, 1)) -> None:
    batches = bench.batches(lengths)
    outcomes = [run(bench.policy(model=model, twin=twin, dtype="float32"), batches) for twin in (False, True)]
    logits, gradient = errors(*outcomes)
    assert logits <= 2e-6 and gradient <= 5e-6, f"logits {logits:.1e}, gradients {gradient:.1e}"


def check_bfloat16_is_as_exact_as_the_twin(bench: Bench) -> None:
    """With fused attention, also around the ring of context-parallel ranks, the modules are as near to float32 as the
    twin.
    """
    batches = bench.batches((28, 84, 44, 100))
    truth = run(bench.policy(twin=True, dtype="float32"), batches)
    twin = errors(run(bench.policy(twin=True), batches), truth)
    modules = errors(run(bench.policy(), batches), truth)
    for found, allowed in zip(modules, twin, strict=True):
        assert found <= 1.3 * allowed, f"logits and gradients: {modules}, the twin's: {twin}"


# -- FP8 -----------------------------------------------------------------------------------------------------

EVERYWHERE = {recipe: Fp8Config(format="hybrid", recipe=recipe) for recipe in RECIPES}


def check_fp8_blockwise_does_not_depend_on_tensor_parallelism(bench: Bench) -> None:
    """A sequence-parallel rank's first projection is its part of a single rank's projection, to the bit.

    The ranks gather the FP8 data and scales of the input.
    """
    whole, own = _first_projection(bench, "blockwise")
    assert torch.equal(own, whole), f"off by {error(own, whole):.1e}"


def check_fp8_tensorwise_depends_on_tensor_parallelism(bench: Bench) -> None:
    """Each shard of a weight has its own scale, which is finer if the shard's largest value is smaller."""
    whole, own = _first_projection(bench, "tensorwise")
    differ = torch.tensor(float(not torch.equal(own, whole)))
    torch.distributed.all_reduce(differ)
    assert differ > 0 and error(own, whole) < 0.1, error(own, whole)


def _first_projection(bench: Bench, recipe: str) -> tuple[Tensor, Tensor]:
    """Return this rank's part of a single rank's projection, and the projection that both ranks compute together."""
    alone = Bench(bench.folder, "dp2")
    batch = alone.batches((28, 84, 44, 100), count=1, fp8=EVERYWHERE[recipe])
    batch = [_of_rank_0(batch[0], alone)]
    whole = _projection(alone.policy(fp8=EVERYWHERE[recipe]), batch)
    together = Bench(bench.folder, bench.name)
    own = _projection(together.policy(fp8=EVERYWHERE[recipe]), batch)
    return whole.chunk(2, -1)[together.groups.tp_rank], own


def _of_rank_0(batch: Any, bench: Bench) -> Any:
    found = [batch]
    torch.distributed.broadcast_object_list(found, src=0, group=bench.groups.dp_group)
    return found[0]


def _projection(policy: Policy, batches: list[Any]) -> Tensor:
    """Return queries, keys and values of the first layer, [T, 1, channels of the rank]."""
    found: list[Tensor] = []
    layer = policy.gpt_models[0].decoder.layers[0].self_attention.linear_qkv
    hook = layer.register_forward_hook(lambda _layer, _inputs, output: found.append(output[0].detach()))
    run_scoring(policy, batches)
    hook.remove()
    return found[0]


def check_fp8_is_near_bfloat16(bench: Bench) -> None:
    """FP8 is near bfloat16 in both recipes, with biases, whose gradients are computed together with the
    quantisation.
    """
    for recipe, fp8 in RECIPES.items():
        batches = bench.batches((28, 84, 44, 100), fp8=fp8)
        twin = run(bench.policy(model="with_bias", twin=True), batches)
        logits, gradient = errors(run(bench.policy(model="with_bias", fp8=fp8), batches), twin)
        assert 0.01 < logits < 0.12 and gradient < 0.35, (recipe, logits, gradient)


def check_fp8_is_near_bfloat16_with_experts(bench: Bench) -> None:
    """FP8 is near bfloat16 in grouped products. Each expert's rows are padded to the multiple that the recipe needs,
    and unpadded again.
    """
    fp8 = EVERYWHERE["tensorwise"]  # rows of 16: the interpreter takes a minute for blockwise's 128
    batches = bench.batches((5, 3), count=1, fp8=fp8)
    twin = run(bench.policy(model="experts", twin=True), batches)
    logits, gradient = errors(run(bench.policy(model="experts", fp8=fp8), batches), twin)
    assert 0.01 < logits < 0.12 and gradient < 0.35, (logits, gradient)


def check_fp8_weights_are_quantised_once_a_pass_and_anew_after_updates(bench: Bench) -> None:
    """A policy after scores and updates equals a newly built policy with the same weights, to the bit, in both
    recipes.

    Its weights are quantised once per pass, not for each micro-batch, and no pass uses copies of the pass before.
    """
    for recipe, fp8 in RECIPES.items():
        batches = bench.batches(LONG, count=3, fp8=fp8)
        kept = bench.policy(fp8=fp8)
        for update in range(3):
            if update:
                disturb(kept, update)
            for is_scoring in (True, False) if update != 1 else (False, True):
                fresh = bench.policy(fp8=fp8)
                for earlier in range(1, update + 1):
                    disturb(fresh, earlier)
                run_pass = run_scoring if is_scoring else run
                with _CountedQuantisations() as counted:
                    found = run_pass(kept, batches)
                assert counted.weights == 2 * 4, counted.weights  # two layers of four matrices
                assert_equal(found, run_pass(fresh, batches), f"{recipe}, after update {update}:")


class _CountedQuantisations:
    """Counts the parameters that are quantised in the `with` block."""

    def __init__(self) -> None:
        self.weights = 0

    def __enter__(self) -> _CountedQuantisations:
        self._quantize = tex.quantize

        def quantize(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.weights += isinstance(tensor, torch.nn.Parameter)
            return self._quantize(tensor, *args, **kwargs)

        tex.quantize = quantize
        return self

    def __exit__(self, *_: Any) -> None:
        tex.quantize = self._quantize


def check_recomputation_changes_no_bit(bench: Bench) -> None:
    """Full recomputation changes no bit in both FP8 recipes, over scores and updates. Selective recomputation changes
    none in bfloat16.
    """
    for fp8, recompute in (
        (RECIPES["blockwise"], "full"),
        (RECIPES["tensorwise"], "full"),
        (None, "selective"),
    ):
        options = {"fp8": fp8} if fp8 else {}
        batches = bench.batches(LONG, **options)
        policies = [bench.policy(recompute=how, **options) for how in ("none", recompute)]
        for update in range(2):
            outcomes = []
            for policy in policies:
                if update:
                    disturb(policy, update)
                run_scoring(policy, batches)
                outcomes.append(run(policy, batches))
            assert_equal(
                outcomes[1], outcomes[0], f"{recompute}, {fp8 and fp8.recipe}, after update {update}:"
            )


# -- faults that must be seen --------------------------------------------------------------------------------


def check_fault_a_row_that_fp8_cannot_take(bench: Bench) -> None:
    """Transformer Engine refuses 33 tokens. The matrix product refuses 40 tokens, because 40 is no multiple of 16."""
    policy = bench.policy(fp8=RECIPES["blockwise"])
    for lengths, message in (((7, 20, 5, 1), "divisible by 8"), ((20, 20), "not a multiple of 16")):
        _assert_raises(message, run, policy, bench.batches(lengths, align=Alignment()))


def check_fault_segments_of_64_bits(bench: Bench) -> None:
    policy, (batch, _) = bench.policy(), bench.batches()
    as_is = forward.PackedSeqParams

    def wider(**fields: Any) -> Any:
        wide = {name: value.long() for name, value in fields.items() if isinstance(value, Tensor)}
        return as_is(**(fields | wide))

    forward.PackedSeqParams = wider  # type: ignore[misc, assignment]
    try:
        _assert_raises(
            "int32", forward_packed, policy.chunks[0], batch.tokens, batch.positions, batch.cu_seqlens
        )
    finally:
        forward.PackedSeqParams = as_is  # type: ignore[misc]


def check_fault_wrong_segments(bench: Bench) -> None:
    """If sequences attend to each other, the results differ far more than correct results may."""
    policy, (batch, _) = bench.policy(dtype="float32"), bench.batches()
    with torch.no_grad():
        right, wrong = (
            forward_packed(policy.chunks[0], batch.tokens, batch.positions, segments)
            for segments in (batch.cu_seqlens, batch.cu_seqlens[[0, -1]])
        )
    assert error(wrong, right) > 0.1, error(wrong, right)


def check_fault_weights_of_before_the_update(bench: Bench) -> None:
    """If the schedule does not announce that a pass begins, the FP8 weights are still those of the pass before."""
    fp8, batches = RECIPES["blockwise"], bench.batches(LONG, fp8=RECIPES["blockwise"])
    policy = bench.policy(fp8=fp8)
    run(policy, batches)
    disturb(policy, 1)
    begin = MegatronModule.set_is_first_microbatch
    MegatronModule.set_is_first_microbatch = lambda self: None  # type: ignore[method-assign]
    try:
        stale = run(policy, batches)
    finally:
        MegatronModule.set_is_first_microbatch = begin  # type: ignore[method-assign]
    logits, _ = errors(stale, run(policy, batches))
    assert logits > 0.05, logits


def _assert_raises(message: str, function: Any, *args: Any) -> None:
    try:
        function(*args)
    except Exception as fault:
        assert message in str(fault), f"raised {fault!r}"
        return
    raise AssertionError(f"nothing was raised; expected {message!r}")
