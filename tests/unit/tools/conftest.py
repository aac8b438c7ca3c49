"""A small worldqa data set for all tests of this folder, made as a user makes it."""

from pathlib import Path

import pytest
from prepare_data import prepare

SMALL = ["--train-questions", "900", "--test-questions", "240", "--demonstrations", "900"]


@pytest.fixture(scope="session")
def worldqa(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("worldqa")
    prepare(["worldqa", "--out", str(out), *SMALL])
    return out
