"""Measurements replace a plan's assumptions; made-up values have known results."""

from __future__ import annotations

import json

import pytest

from a2tgpo.config.load import load_config
from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import KNOWN_MODELS
from a2tgpo.plan.hardware import GIB, GPUS
from a2tgpo.plan.measured import QUANTITIES, calibrate, calibration_text
from a2tgpo.plan.plan import make_plan

H100 = GPUS["h100-80gb"]
CARD = {"gpu_name": "NVIDIA H100 80GB HBM3", "gpu_memory_gib": 79.2, "time": "2027-01-02T03:04:05"}
VALUES = {
    "train_tflops_bf16": 494.5,
    "train_tflops_blockwise": 791.2,
    "train_tflops_tensorwise": 989.0,
    "train_tflops_mxfp8": 1.0,
    "prefill_tflops": 296.7,
    "optimizer_gb_s": 2680.0,
    "node_bus_gb_s": 360.0,
    "all_reduce_us": 20.0,
    "decode_step_ms": 4.0,
    "decode_sequence_us": 0.0,
    "activation_ratio": 1.5,
    "context_gib": 2.0,
    "fragmentation_share": 0.1,
}


def row(quantity, measured, status="INFO"):
    return {"check": "c", "name": "n", "status": status, "measured": measured, "quantity": quantity}


@pytest.fixture
def write(tmp_path):
    def written(values, machine=CARD, **changes):
        rows = [row(name, value) for name, value in values.items()]
        path = tmp_path / "found.json"
        path.write_text(json.dumps({"machine": machine, "checks": rows} | changes))
        return str(path)

    return written


def test_every_quantity_replaces_its_assumption_by_the_value_worked_out_by_hand(write):
    assert VALUES.keys() == QUANTITIES.keys()
    found = calibrate(write(VALUES), H100, fp8_recipe="blockwise")
    assert found.assumed == Assumptions(
        compute_utilisation=pytest.approx(0.5),  # of 989 TFLOP/s
        fp8_speed=pytest.approx(1.6),
        prefill_utilisation=pytest.approx(0.3),
        memory_utilisation=pytest.approx(0.8),  # of 3.35 TB/s
        link_utilisation=pytest.approx(0.8),  # of 450 GB/s
        collective_latency_s=pytest.approx(20e-6),
        decode_step_s=pytest.approx(4e-3),
        decode_sequence_s=0.0,
        activation_ratio=1.5,
        context_gib=2.0,
        fragmentation=0.1,
    )
    assert found.gpu.memory_gib == 79.2
    other = calibrate(write(VALUES), H100, fp8_recipe="tensorwise")
    assert other.assumed.fp8_speed == pytest.approx(2.0)


def test_what_is_missing_or_failed_stays_as_it_was_assumed(write):
    rows = [row("train_tflops_bf16", 494.5, status="FAIL"), row("decode_step_ms", 4.0, status="PASS")]
    found = calibrate(write({}, checks=rows), H100, fp8_recipe="blockwise")
    assert found.assumed == Assumptions(decode_step_s=pytest.approx(4e-3))


def test_the_text_says_what_was_replaced_by_what_and_from_which_file(write):
    path = write({"train_tflops_bf16": 494.5})
    lines = calibration_text(calibrate(path, H100, fp8_recipe="blockwise")).splitlines()
    assert lines[0] == f"measured ({path}, NVIDIA H100 80GB HBM3, 2027-01-02T03:04:05)"
    assert lines[1] == "  compute_utilisation: 0.5 instead of 0.45 (494.5 of 989 TFLOP/s)"
    assert lines[2] == "  memory_gib: 79.2 instead of 79.1 (what torch sees of the card)"
    assert lines[3].startswith("  still assumed: fp8_speed, imbalance, memory_utilisation,")
    assert "compute_utilisation" not in lines[3] and len(lines) == 4


def test_a_plan_with_measurements_moves_as_they_say(write):
    config = load_config("configs/train_8b.yaml", ["rollout.gpu_memory_fraction=0.6"])

    def plan(**values):
        found = calibrate(write(values), H100, fp8_recipe="blockwise")
        return make_plan(config, KNOWN_MODELS["qwen3-8b"], found.gpu, gpus=8, assumed=found.assumed)

    slow, fast = plan(train_tflops_bf16=200.0), plan(train_tflops_bf16=400.0)
    assert slow.update.compute == pytest.approx(2 * fast.update.compute)
    assert slow.rollout == fast.rollout
    small, large = plan(context_gib=1.0), plan(context_gib=4.0)
    for less, more in zip(small.phases, large.phases, strict=True):
        assert more.parts["reserve"] - less.parts["reserve"] == pytest.approx(3 * GIB)
    as_counted, larger = (plan(activation_ratio=ratio).phases[-1].parts for ratio in (1.0, 1.5))
    assert larger["activations"] == pytest.approx(1.5 * as_counted["activations"])
    assert larger["logits and gradient"] == as_counted["logits and gradient"]


@pytest.mark.parametrize(
    ("machine", "changes", "message"),
    [
        (
            {"gpu_name": None, "gpu_memory_gib": None},
            {},
            "was measured without a GPU; allowed: a file of a h100",
        ),
        (
            CARD | {"gpu_name": "NVIDIA H200"},
            {},
            "on a NVIDIA H200 of 79.2 GiB; allowed: a file of a h100-80gb",
        ),
        (CARD | {"gpu_memory_gib": 93.1}, {}, "of 93.1 GiB; allowed: a file of a h100-80gb"),
        (CARD, {"checks": [row("speed", 1.0)]}, "the quantity 'speed'; allowed: train_tflops_bf16"),
        (CARD, {"checks": [row("decode_step_ms", None)]}, "None for decode_step_ms; allowed: a number"),
        (CARD, {"checks": [row("decode_step_ms", float("nan"))]}, "nan for decode_step_ms"),
        (CARD, {"checks": [row("train_tflops_bf16", 0)]}, "0 for train_tflops_bf16; allowed: a number > 0"),
        (CARD, {"checks": 3}, "is not what tools/gpu_check.py --json writes"),
    ],
)
def test_a_file_that_cannot_calibrate_is_refused_in_one_line(write, machine, changes, message):
    with pytest.raises(ConfigError, match=r"^--measured: [^\n]*$") as caught:
        calibrate(write({}, machine=machine, **changes), H100, fp8_recipe="blockwise")
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), (None, "cannot be read")])
def test_a_file_that_is_no_json_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "found.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        calibrate(str(path), H100, fp8_recipe="blockwise")
