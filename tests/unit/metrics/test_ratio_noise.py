"""Rounding noise in the ratio is told apart from the policy's movement and reported in a line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.config.load import load_config
from a2tgpo.metrics.ratio_noise import FIRST_STEPS, RatioNoise, noise_of, round_up

ROOT = Path(__file__).parents[3]


def watch(*overrides):
    return RatioNoise(load_config(ROOT / "configs/train_70b.yaml", overrides))


def squares(after_one, after_two):
    return {"ratio/mean_square_after_1": after_one, "ratio/mean_square_after_2": after_two}


def test_noise_alone_is_found_and_movement_alone_is_none():
    assert noise_of(4e-6, 4e-6) == pytest.approx(2e-3)
    assert noise_of(1e-6, 4e-6) == 0.0  # movement: twice as far after two updates
    assert noise_of(1e-6, 2e-6) == 0.0  # movement: the two updates have unrelated directions
    assert noise_of(5e-6, 6e-6) == pytest.approx(2e-3)  # the same movement plus noise


@given(one=st.floats(0, 1e-2), two=st.floats(0, 1e-2))
def test_noise_is_never_more_than_what_was_seen_after_one_update(one, two):
    assert 0 <= noise_of(one, two) <= math.sqrt(one)


def test_noise_is_told_apart_from_movement_in_drawn_ratios():
    generator = torch.Generator().manual_seed(0)

    def mean_square(num_updates):
        noise, *moves = torch.randn(1 + num_updates, 20_000, dtype=torch.float64, generator=generator)
        return float((2e-3 * noise + 1e-3 * sum(moves)).square().mean())

    assert noise_of(mean_square(1), mean_square(2)) == pytest.approx(2e-3, rel=0.05)


def test_after_three_measured_steps_a_line_says_that_rounding_clips_and_what_to_set():
    noise = watch()
    told = [noise.watch(squares(9e-6, 9e-6)) for _ in range(FIRST_STEPS - 1)]
    assert noise.watch({"ratio/mean": 1.0}) == ({}, ""), "too few mini-batches: not measured"
    told += [noise.watch(squares(9e-6, 9e-6)) for _ in range(3)]
    assert [bool(line) for _, line in told] == [False] * (FIRST_STEPS - 1) + [True, False, False]
    for metrics, _ in told:
        assert metrics == pytest.approx({"ratio/noise": 3e-3, "ratio/noise_share": 1.0})
    assert told[FIRST_STEPS - 1][1] == (
        "noise of the turn ratio over 3 steps: 0.003, 100% of the clipping range (clip_low 0.003, clip_high 0.004): "
        "rounding decides what is clipped; set update.prompts_per_minibatch=64 (one mini-batch a step: no noise, no "
        "clipping), or algorithm.clip_low=0.006 algorithm.clip_high=0.008"
    )


def test_noise_well_inside_the_clipping_range_is_told_as_harmless():
    noise = watch()
    line = [noise.watch(squares(1e-6, 1e-6))[1] for _ in range(FIRST_STEPS)][-1]
    assert "33% of the clipping range" in line and line.endswith("the policy decides what is clipped")


@pytest.mark.parametrize("measured", [2e-3, 3.7e-3, 0.05])
def test_the_range_that_is_advised_ends_the_complaint(measured):
    def last_line(*overrides):
        noise = watch(str(ROOT / "configs/precision/fp8.yaml"), *overrides)
        return [noise.watch(squares(measured**2, measured**2))[1] for _ in range(FIRST_STEPS)][-1]

    line = last_line()
    assert "turn model.fp8 off, or set" in line
    advised = [word for word in line.split() if word.startswith("algorithm.clip")]
    assert last_line(*advised).endswith("the policy decides what is clipped")
    high, low = (float(word.split("=")[1]) for word in reversed(advised))
    assert high / low == pytest.approx(4 / 3, rel=0.1)


def test_an_objective_without_a_clipping_range_has_noise_but_no_share_and_no_line():
    noise = watch(f"{ROOT}/configs/algorithm/sapo.yaml")
    found = [noise.watch(squares(1e-4, 1e-4)) for _ in range(4)]
    assert found == [({"ratio/noise": pytest.approx(1e-2)}, "")] * 4


def test_numbers_are_rounded_up_to_two_digits():
    rounded = [round_up(value) for value in (0.00611, 0.006, 0.995, 11.2)]
    assert rounded == pytest.approx([0.0062, 0.006, 1.0, 12])
