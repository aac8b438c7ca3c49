"""Replace a plan's assumptions with values that tools/gpu_check.py has measured."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.hardware import Gpu

QUANTITIES = {
    "train_tflops_bf16": "forward and backward pass of a model slice in bfloat16, TFLOP/s",
    "train_tflops_blockwise": "the same in blockwise FP8, operations counted as in bfloat16, TFLOP/s",
    "train_tflops_tensorwise": "the same in tensorwise FP8, TFLOP/s",
    "train_tflops_mxfp8": "the same in MXFP8, TFLOP/s",
    "prefill_tflops": "the engine's prefill of a model slice, TFLOP/s",
    "optimizer_gb_s": "memory traffic of an optimizer step, GB/s",
    "node_bus_gb_s": "bus bandwidth of a large all-reduce among the cards of one node, GB/s",
    "all_reduce_us": "one small all-reduce, us",
    "decode_step_ms": "one engine step of one sequence of a tiny model, ms",
    "decode_sequence_us": "what one more running sequence adds to it, us",
    "activation_ratio": "what a pass of a model slice keeps and works with, against what a plan counts",
    "context_gib": "memory of a card that belongs neither to torch nor to the engine's parts, GiB",
    "fragmentation_share": "memory that torch's allocator reserves beyond what tensors hold, as a share of that",
}
"""Measurements that a plan can use, with their meaning. tools/gpu_check.py writes these names into its JSON."""

MAY_BE_ZERO = ("decode_sequence_us", "fragmentation_share")

MEMORY_TOLERANCE = 0.1
"""Largest relative difference between the memory of two GPUs of the same kind."""


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """A measurement that replaces an assumption of a plan."""

    assumption: str
    assumed: float
    measured: float
    why: str
    """The meaning of the measurement in words, with its unit."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A plan's assumptions, with measured values where measurements exist, and the source of the measurements."""

    source: str
    """File, GPU and time of the measurements."""
    assumed: Assumptions
    gpu: Gpu
    replaced: list[Replacement]


def calibrate(path: str, gpu: Gpu, *, fp8_recipe: str, assumed: Assumptions | None = None) -> Calibration:
    """Return the assumptions of a plan on `gpu`, updated with values that tools/gpu_check.py has measured.

    Failed measurements are ignored. An assumption is kept if the file has no measurement of its quantity.

    Args:
        fp8_recipe: the setting `model.fp8.recipe`. Only the measured speed of this recipe is used.

    Raises:
        ConfigError: with a one-line message, if the file is not a JSON of tools/gpu_check.py, or if it was not
            measured on a GPU of the same kind.
    """
    assumed = assumed or Assumptions()
    content = _read(path)
    machine = content["machine"]
    _require_same_card(path, machine, gpu)
    found = _quantities(path, content["checks"])
    replaced = _replacements(found, gpu, assumed, fp8_recipe=fp8_recipe)
    memory = machine["gpu_memory_gib"]
    values = {each.assumption: each.measured for each in replaced}
    replaced.append(
        Replacement(
            assumption="memory_gib",
            assumed=gpu.memory_gib,
            measured=memory,
            why="what torch sees of the card",
        )
    )
    return Calibration(
        source=f"{path}, {machine['gpu_name']}, {machine.get('time', 'time not known')}",
        assumed=dataclasses.replace(assumed, **values),
        gpu=dataclasses.replace(gpu, memory_gib=memory),
        replaced=replaced,
    )


def calibration_text(calibration: Calibration) -> str:
    """Return one line for each replaced assumption, with its new value and its meaning."""
    lines = [f"measured ({calibration.source})"]
    lines += [
        f"  {each.assumption}: {each.measured:.4g} instead of {each.assumed:.4g} ({each.why})"
        for each in calibration.replaced
    ]
    kept = [
        field.name
        for field in dataclasses.fields(calibration.assumed)
        if field.name not in {each.assumption for each in calibration.replaced}
    ]
    return "\n".join([*lines, f"  still assumed: {', '.join(kept)}"])


def _replacements(
    found: Mapping[str, float], gpu: Gpu, assumed: Assumptions, *, fp8_recipe: str
) -> list[Replacement]:
    replaced = []

    def put(assumption: str, measured: float, why: str) -> None:
        old = getattr(assumed, assumption)
        replaced.append(Replacement(assumption=assumption, assumed=old, measured=measured, why=why))

    def share(assumption: str, quantity: str, peak: float, unit: str) -> None:
        if quantity in found:
            put(assumption, found[quantity] / peak, f"{found[quantity]:.4g} of {peak:g} {unit}")

    def scaled(assumption: str, quantity: str, factor: float, unit: str) -> None:
        if quantity in found:
            put(assumption, found[quantity] * factor, f"{found[quantity]:.4g} {unit}".rstrip())

    share("compute_utilisation", "train_tflops_bf16", gpu.bf16_tflops, "TFLOP/s")
    fp8 = f"train_tflops_{fp8_recipe}"
    if fp8 in found and "train_tflops_bf16" in found:
        why = f"{found[fp8]:.4g} TFLOP/s {fp8_recipe} against {found['train_tflops_bf16']:.4g}"
        put("fp8_speed", found[fp8] / found["train_tflops_bf16"], why)
    share("prefill_utilisation", "prefill_tflops", gpu.bf16_tflops, "TFLOP/s")
    share("memory_utilisation", "optimizer_gb_s", 1e3 * gpu.memory_tb_per_s, "GB/s, optimizer step")
    share("link_utilisation", "node_bus_gb_s", gpu.node_gb_per_s, "GB/s within the node")
    scaled("collective_latency_s", "all_reduce_us", 1e-6, "us")
    scaled("decode_step_s", "decode_step_ms", 1e-3, "ms")
    scaled("decode_sequence_s", "decode_sequence_us", 1e-6, "us")
    scaled("activation_ratio", "activation_ratio", 1.0, "times what is counted")
    scaled("context_gib", "context_gib", 1.0, "GiB")
    scaled("fragmentation", "fragmentation_share", 1.0, "")
    return replaced


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--measured: {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--measured: {path} is not valid JSON: {error}") from None
    is_ours = (
        isinstance(content, dict)
        and isinstance(content.get("machine"), dict)
        and isinstance(content.get("checks"), list)
        and all(isinstance(row, dict) for row in content["checks"])
    )
    if not is_ours:
        raise ConfigError(f"--measured: {path} is not what tools/gpu_check.py --json writes")
    return content


def _require_same_card(path: str, machine: Mapping[str, Any], gpu: Gpu) -> None:
    name, memory = machine.get("gpu_name"), machine.get("gpu_memory_gib")
    if not isinstance(name, str) or not isinstance(memory, float):
        raise ConfigError(
            f"--measured: {path} was measured without a GPU; allowed: a file of a {gpu.name}, which the plan is for"
        )
    is_same_kind = gpu.name.split("-")[0] in re.split(r"[^a-z0-9]+", name.lower())
    if not is_same_kind or not abs(memory / gpu.memory_gib - 1) <= MEMORY_TOLERANCE:
        raise ConfigError(
            f"--measured: {path} was measured on a {name} of {memory:.1f} GiB; allowed: a file of a {gpu.name} "
            f"({gpu.memory_gib:.1f} GiB), which the plan is for (--gpu)"
        )


def _quantities(path: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the measured values by name. If several rows have the same name, the last row wins."""
    found = {}
    for row in rows:
        quantity: Any = row.get("quantity")
        measured: Any = row.get("measured")
        if not quantity or row.get("status") not in ("PASS", "INFO"):
            continue
        if quantity not in QUANTITIES:
            raise ConfigError(
                f"--measured: {path} has the quantity {quantity!r}; allowed: {', '.join(QUANTITIES)}"
            )
        if not _is_measurement(measured):
            raise ConfigError(f"--measured: {path} has {measured!r} for {quantity}; allowed: a number >= 0")
        if measured == 0 and quantity not in MAY_BE_ZERO:
            raise ConfigError(f"--measured: {path} has 0 for {quantity}; allowed: a number > 0")
        found[quantity] = float(measured)
    return found


def _is_measurement(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value) and value >= 0
