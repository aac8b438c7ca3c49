"""The predicted cost of each method in docs/methods.md."""

import re
from pathlib import Path

import pytest

from a2tgpo.config.load import load_config
from a2tgpo.plan.dimensions import model_dimensions
from a2tgpo.plan.hardware import GPUS
from a2tgpo.plan.plan import make_plan

ROOT = Path(__file__).parents[3]
ROWS = re.findall(
    r"^\| `(\w+)\.yaml`.*\| (\d+) s \|", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), re.MULTILINE
)
PRESETS = {path.stem: path for path in (ROOT / "configs" / "algorithm").glob("*.yaml")}


def test_the_table_of_methods_has_a_cost_for_every_preset():
    assert sorted(name for name, _ in ROWS) == sorted(PRESETS)


@pytest.mark.parametrize(("name", "seconds"), ROWS)
def test_the_table_of_methods_has_the_plans_seconds_of_a_step_within_3_percent(name, seconds):
    config = load_config(ROOT / "configs/train_70b.yaml", [str(PRESETS[name])])
    dimensions, _ = model_dimensions(config.model.path)
    plan = make_plan(config, dimensions, GPUS[config.cluster.gpu], gpus=config.cluster.gpus)
    assert plan.step_seconds == pytest.approx(float(seconds), rel=0.03)
