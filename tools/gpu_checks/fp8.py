"""Compare each FP8 recipe with bfloat16, on a small model and on a slice that has a large model's real shapes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from gpu_checks import passes
from gpu_checks.bench import Bench
from gpu_checks.models import slice_dimensions, write_model
from gpu_checks.passes import MAX_GRADIENT_GAP, MAX_LOGPROB_GAP

if TYPE_CHECKING:
    from a2tgpo.config.fp8 import Format, Recipe

MAX_FP8_LOGPROB_GAP = 0.2
MAX_FP8_GRADIENT_GAP = 0.35
"""Largest accepted differences of log-probs and of gradients between FP8 and bfloat16, defined as in `passes`.

The log-probs of emulated FP8 (`fp8_study/emulation.py`) differ from those of bfloat16 by 0.06 with every recipe. If
Transformer Engine's kernels are replaced by rounding in PyTorch, the gradients differ from those of bfloat16 by 0.17
for the small model, and by 0.10 for the slice.
"""
TIMED_PASSES = 8


def check_fp8(bench: Bench) -> None:
    """Compare log-probs and gradients of each FP8 recipe with bfloat16, on a small model."""
    groups, path = passes.join(bench), write_model(bench.work / "model")
    plain = passes.logprobs_and_gradients(path, groups, dtype="bfloat16")
    _compare_recipes(bench, "fp8", path, groups, plain, number_format="hybrid")


def check_slice(bench: Bench) -> None:
    """Compare a slice of a large model in bfloat16 with transformers, and each FP8 recipe with bfloat16. Measure
    speed.

    The slice has the shapes of one tensor-parallel rank.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    given = bench.settings
    dimensions = slice_dimensions(given.like, tensor=given.tensor, layers=given.layers, on_gpu=on_gpu)
    shapes = f"hidden {dimensions.hidden}, {dimensions.ffn} feed-forward channels, {dimensions.layers} layers"
    groups = passes.join(bench)
    timed = 8192 if on_gpu else 256
    path = write_model(bench.work / "slice", dimensions, max_positions=timed, device=groups.device)
    # Use bfloat16 also on a CPU, because these rows test number formats. The check `packed_attention` tests the
    # computation itself.
    plain = passes.logprobs_and_gradients(path, groups, dtype="bfloat16")
    expected = passes.by_transformers(path, groups.device)
    gap = (plain[0] - expected[0]).abs().mean().item()
    bench.at_most("slice in bfloat16, log-probs", gap, MAX_LOGPROB_GAP["bfloat16"], "nats", shapes)
    gap = passes.distance(plain[1], expected[1])
    bench.at_most("slice in bfloat16, gradients", gap, MAX_GRADIENT_GAP["bfloat16"])
    del expected
    passes.release()
    _time(bench, path, groups, dimensions, tokens=timed, recipe=None)
    if not on_gpu:
        return bench.skip("slice in fp8", "needs a GPU: FP8 is computed by Transformer Engine")
    # Use the format e4m3 here, because the check `fp8` uses the format hybrid.
    for recipe in _compare_recipes(bench, "slice in fp8", path, groups, plain, number_format="e4m3"):
        _time(bench, path, groups, dimensions, tokens=timed, recipe=recipe)
    return None


def _compare_recipes(
    bench: Bench,
    what: str,
    path: str,
    groups: Any,
    plain: tuple[Any, dict[str, Any]],
    *,
    number_format: Format,
) -> list[Recipe]:
    """Add each recipe's rows for log-probs and gradients, or a FAIL or SKIP row. Return the recipes that ran."""
    from a2tgpo.config.fp8 import TOKEN_MULTIPLES, Fp8Config
    from a2tgpo.io.errors import ConfigError

    computed = []
    for recipe in TOKEN_MULTIPLES:
        fp8 = Fp8Config(format=number_format, recipe=recipe)
        try:
            found = passes.logprobs_and_gradients(path, groups, dtype="bfloat16", fp8=fp8)
        except ConfigError as error:
            bench.skip(f"{what} {recipe}", str(error))
            continue
        except (RuntimeError, AssertionError, ValueError) as error:  # cuBLASLt may refuse the shape
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
            bench.at_most(f"{what} {recipe}, log-probs", float("nan"), MAX_FP8_LOGPROB_GAP, "nats", reason)
            continue
        finally:
            passes.release()
        gap = (found[0] - plain[0]).abs().mean().item()
        in_force = "equal to bfloat16 to the bit: FP8 was not in force" if gap == 0.0 else ""
        bench.at_most(
            f"{what} {recipe}, log-probs", gap or float("nan"), MAX_FP8_LOGPROB_GAP, "nats", in_force
        )
        bench.at_most(
            f"{what} {recipe}, gradients", passes.distance(found[1], plain[1]), MAX_FP8_GRADIENT_GAP
        )
        computed.append(recipe)
    return computed


def _time(
    bench: Bench, path: str, groups: Any, dimensions: Any, *, tokens: int, recipe: Recipe | None
) -> None:
    """Measure the floating point operations per second of forward and backward passes over four sequences."""
    import torch

    from a2tgpo.config.fp8 import Fp8Config
    from a2tgpo.plan.flops import forward_flops
    from a2tgpo.update.train_step import compute_gradients

    fp8 = Fp8Config(format="e4m3", recipe=recipe) if recipe else Fp8Config()
    policy = passes.build(path, groups, dtype="bfloat16", fp8=fp8)
    lengths = (tokens // 4 - 1,) * 4
    batch = passes.packed(lengths, fp8=fp8)
    sampled = batch.loss_mask[0].to(groups.device)
    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)

    def loss(number: int, logprobs: Any, entropy: Any) -> tuple[Any, dict]:
        return logprobs[sampled].mean(), {}

    seconds, held = [], 0
    for _ in range(TIMED_PASSES):
        wait()
        if on_gpu:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        compute_gradients(policy, [batch], loss)
        wait()
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds[1:])[len(seconds[1:]) // 2]  # the first pass compiles and allocates
    operations = 3 * tokens * forward_flops(dimensions, context=lengths[0] / 2).total
    name = recipe or "bf16"
    note = f"{tokens} tokens in {1e3 * median:.4g} ms, median; the first took {seconds[0]:.2f} s"
    quantity = f"train_tflops_{name}"
    bench.info(
        f"slice in {name}, forward and backward", operations / median / 1e12, "TFLOP/s", note, quantity
    )
    if on_gpu and recipe is None:
        _compare_activations(bench, dimensions, tokens, torch.cuda.max_memory_allocated() - held)
    del policy
    passes.release()


def _compare_activations(bench: Bench, dimensions: Any, tokens: int, measured: int) -> None:
    """Add a row with the ratio of `measured`, the bytes that a pass allocated, to a plan's estimate."""
    planned = planned_activations(dimensions, tokens)
    note = f"{measured / 2**30:.3g} GiB, planned {planned / 2**30:.3g}"
    bench.info(
        "activations of the slice, measured / planned", measured / planned, "", note, "activation_ratio"
    )


def planned_activations(dimensions: Any, tokens: int) -> float:
    """Return a plan's estimate of the bytes that a bfloat16 pass over `tokens` tokens allocates."""
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.plan.activations import MicrobatchShape

    shape = MicrobatchShape(dimensions=dimensions, parallel=ParallelConfig(), tokens=tokens, element_bytes=2)
    layers = dimensions.layers * shape.saved_layer_bytes("none") + shape.backward_workspace_bytes("none")
    return layers + shape.logit_bytes(with_gradient=True)
