"""Configurations to plan for."""

from __future__ import annotations

from pathlib import Path

import pytest

import a2tgpo.parallel  # noqa: F401  Megatron is adapted to the machine before the tests here import it
from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config_70b() -> RunConfig:
    return load_config(ROOT / "configs/train_70b.yaml")


@pytest.fixture
def config_8b() -> RunConfig:
    return load_config(ROOT / "configs/train_8b.yaml")
