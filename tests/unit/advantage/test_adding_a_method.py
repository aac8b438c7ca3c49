import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import a2tgpo.advantage.methods
from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.load import load_config
from a2tgpo.config.method_part import ADVANTAGE, OBJECTIVE, TOKEN_CREDIT
from a2tgpo.io.errors import ConfigError
from a2tgpo.loss.credit import credit_tokens
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import policy_loss
from a2tgpo.trajectory import Call, Trajectory, Turn

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def code_block(language: str, heading: str = "### An advantage") -> str:
    """Return the only block of `language` under the heading in docs/methods.md."""
    section = re.split(r"^###? ", DOCS.split(f"{heading}\n")[1], flags=re.MULTILINE)[0]
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return block


@pytest.fixture
def new_method(tmp_path, monkeypatch):
    """Add a source file to the modules of advantage/methods/, and remove it afterwards."""

    def add(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(
            a2tgpo.advantage.methods, "__path__", [*a2tgpo.advantage.methods.__path__, str(tmp_path)]
        )
        monkeypatch.delitem(sys.modules, f"a2tgpo.advantage.methods.{name}", raising=False)

    before = set(sys.modules)
    yield add
    for name in set(sys.modules) - before:
        if name.startswith("a2tgpo.advantage.methods."):
            del sys.modules[name]


def trajectory(prompt: int, outcome: float, num_process_turns: int) -> Trajectory:
    turns = [
        Turn(tokens=[1], rollout_logprobs=[0.0], calls=[Call(tool="search", arguments="q")], info_gain=0.3)
    ] * num_process_turns
    return Trajectory(
        prompt_index=prompt,
        prompt_id=str(prompt),
        sample_index=0,
        prompt_tokens=[0],
        turns=[*turns, Turn(tokens=[2], rollout_logprobs=[0.0])],
        stop_reason="answer",
        outcome_reward=outcome,
    )


def test_the_documented_way_to_add_a_method_works_as_it_stands(new_method, tmp_path):
    with pytest.raises(
        ConfigError, match=r"algorithm\.advantage is 'rloo'; allowed: appo \| at2po \| gigpo \| grpo \| gtpo"
    ):
        AlgorithmConfig(advantage="rloo")
    new_method("rloo", code_block("python"))
    preset = tmp_path / "rloo.yaml"
    preset.write_text(code_block("yaml"), encoding="utf-8")
    config = load_config(ROOT / "configs" / "quickstart.yaml", [str(preset)])
    assert config.algorithm.advantage == "rloo"

    items = [(0, 1.0, 2), (0, 0.0, 0), (1, 1.0, 1), (0, -1.0, 3), (2, 1.0, 1), (2, 1.0, 2)]
    table = build_turn_table([trajectory(*item) for item in items], num_prompts=3, max_turns=3)
    got = compute_advantages(table, config.algorithm, dp_group=None).advantages
    for i, (prompt, outcome, num_process_turns) in enumerate(items):
        others = [r for j, (p, r, _) in enumerate(items) if p == prompt and j != i]
        expect = outcome - (sum(others) / len(others) if others else 0.0)
        num_turns = num_process_turns + 1
        np.testing.assert_allclose(got[i, :num_turns].tolist(), [expect] * num_turns, atol=1e-12)
        assert got[i, num_turns:].tolist() == [0.0] * (4 - num_turns)
    empty = build_turn_table([], num_prompts=3, max_turns=3)
    assert compute_advantages(empty, config.algorithm, dp_group=None).advantages.shape == (0, 4)


def written(folder: Path, heading: str) -> Path:
    """Write the documented example under the heading to a file of the user, and return its path."""
    path = folder / "mine.py"
    path.write_text(code_block("python", heading), encoding="utf-8")
    return path


def inputs_of(old: torch.Tensor) -> LossInputs:
    n = len(old)
    return LossInputs(
        old_logprobs=old,
        advantages=torch.arange(1.0, n + 1).double(),
        clip_scale=torch.ones(n),
        weights=torch.full((n,), 0.5).double(),
        turn_ids=torch.zeros(n, dtype=torch.int64),
        sequence_ids=torch.zeros(n, dtype=torch.int64),
        num_turns=1,
        num_sequences=1,
    )


def test_the_documented_advantage_works_as_a_file_of_the_user_too(tmp_path):
    path = written(tmp_path, "### An advantage")
    table = build_turn_table([trajectory(0, 1.0, 1), trajectory(0, 0.0, 0)], num_prompts=1, max_turns=3)
    config = AlgorithmConfig(advantage=f"{path}:advantages")
    found = compute_advantages(table, config, dp_group=None).advantages
    assert found.tolist() == [[1.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]
    path.with_name("broken.py").write_text(
        "def advantages(table, config, *, dp_group):\n    return table.gone\n"
    )
    broken = AlgorithmConfig(advantage=f"{path.with_name('broken.py')}:advantages")
    with pytest.raises(ConfigError, match=r"broken\.py:2 advantages: AttributeError.*; mend the file"):
        compute_advantages(table, broken, dp_group=None)


@pytest.mark.parametrize(
    "offsets",
    ["[[0.0, 0.0]]", "[torch.zeros(1, 2)]", "[torch.zeros(3)]", "[]", "[torch.zeros(2)] * 2", "0"],
)
def test_offsets_that_are_not_one_value_per_token_are_refused_in_one_line(tmp_path, offsets):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "from a2tgpo.advantage.turn_table import TurnAdvantages\n\n\n"
        "def advantages(table, config, *, dp_group):\n"
        "    of_turns = torch.zeros(len(table.outcome), table.max_turns + 1).double()\n"
        "    return TurnAdvantages(advantages=of_turns, normalized_gain=table.info_gain,\n"
        f"        normalized_outcome=table.outcome, token_offsets={offsets})\n"
    )
    table = build_turn_table([trajectory(0, 1.0, 1)], num_prompts=1, max_turns=1)
    config = AlgorithmConfig(advantage=f"{path}:advantages")
    with pytest.raises(ConfigError, match="token_offsets have one tensor per trajectory") as refused:
        compute_advantages(table, config, dp_group=None)
    assert "\n" not in str(refused.value)


def test_the_documented_objective_works_as_it_stands(tmp_path):
    config = AlgorithmConfig(objective=f"{written(tmp_path, '### An objective')}:token_losses")
    old = torch.tensor([-1.0, -2.0, -0.5]).double()
    logprobs = (old + 0.1).requires_grad_()
    inputs = inputs_of(old)
    result = policy_loss(logprobs, inputs, config)
    result.loss.backward()
    assert logprobs.grad.tolist() == [-0.5, -1.0, -1.5]
    assert result.ratio.tolist() == pytest.approx([math.exp(0.1)] * 3) and not result.is_clipped.any()


def test_the_documented_token_credit_works_as_it_stands(tmp_path):
    config = AlgorithmConfig(token_credit=f"{written(tmp_path, '### A token credit')}:token_credit")
    logprobs = torch.tensor([0.0, -1.0]).double()
    credited, measured = credit_tokens(logprobs, inputs_of(logprobs), config)
    expected = [1.0, 2 * (0.3 * math.exp(-1) + 0.7)]
    assert credited.advantages.tolist() == pytest.approx(expected, rel=1e-12)
    assert measured["mean_factor"].tolist() == pytest.approx([1.0, expected[1] / 2])


def test_the_new_method_is_gone_after_the_test():
    assert "rloo" not in ADVANTAGE.names()


def test_naming_a_method_does_not_run_its_file(new_method):
    new_method("exploding", "raise AssertionError('imported')")
    config = AlgorithmConfig(advantage="exploding")
    with pytest.raises(AssertionError, match="imported"):
        compute_advantages(build_turn_table([], num_prompts=1, max_turns=1), config, dp_group=None)


def test_the_documentation_names_every_method_and_every_preset():
    for name in (*ADVANTAGE.names(), *OBJECTIVE.names(), *TOKEN_CREDIT.names()):
        assert f"`{name}`" in DOCS, name
    for preset in (ROOT / "configs" / "algorithm").glob("*.yaml"):
        assert f"`{preset.name}`" in DOCS, preset.name
