"""Fixtures: a world of one process, and tiny checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import build_model

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.parallel.initialize import initialize, shutdown


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    environment = dict(os.environ)
    yield initialize(ParallelConfig(), seed=0)
    shutdown()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a random bfloat16 model of an architecture and returns its folder."""

    def save(architecture: str = "llama", *, tied: bool = True) -> Path:
        folder = tmp_path / architecture
        build_model(architecture, vocab_size=250, tied=tied).to(torch.bfloat16).save_pretrained(folder)
        return folder

    return save
