"""The methods in configs/algorithm/, and configuration files among the arguments."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from a2tgpo.config.algorithm import OF_INNER_BRANCHES, OF_TREES, AlgorithmConfig
from a2tgpo.config.load import load_config
from a2tgpo.io.errors import ConfigError

ROOT = Path(__file__).parents[3]
EXPERIMENT = ROOT / "configs" / "quickstart.yaml"
PRESETS = {path.stem: path for path in sorted((ROOT / "configs" / "algorithm").glob("*.yaml"))}

GRPO = {
    "algorithm.advantage": "grpo",
    "algorithm.objective": "clipped_ratio",
    "algorithm.token_credit": "none",
    "algorithm.ratio": "token",
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.clip_beta": 0.0,
    "algorithm.aggregation": "seq-mean-token-mean",
    "algorithm.normalize_by_std": True,
    "algorithm.failed_calls": "neutral",
    "algorithm.kl_coef": 0.0,
    "rollout.dynamic_sampling": False,
    "reward.overlong_buffer_tokens": 0,
    "rollout.tree.initial": 0,
    "rollout.inner_branches": 0,
    "update.extrapolation.horizon": 0,
}
A2TGPO = {
    **GRPO,
    "algorithm.advantage": "turn_group",
    "algorithm.gamma": 1.0,
    "algorithm.alpha": 1.0,
    "algorithm.rescale": True,
    "algorithm.ratio": "turn",
    "algorithm.clip_low": 3e-3,
    "algorithm.clip_high": 4e-3,
    "algorithm.clip_beta": 0.3,
    "algorithm.dual_clip": 0.0,
    "rollout.gain.measure": "probability",
}
EXPECTED = {
    "grpo": {
        **GRPO,
        "algorithm.dual_clip": 3.0,
        "algorithm.kl_coef": 1e-3,
        "algorithm.kl_estimator": "k3",
    },
    "gxpo": {
        **GRPO,
        "algorithm.dual_clip": 3.0,
        "algorithm.kl_coef": 1e-3,
        "algorithm.kl_estimator": "k3",
        "update.extrapolation.horizon": 5,
        "update.extrapolation.alpha": 0.5,
    },
    "dapo": {
        **GRPO,
        "algorithm.clip_high": 0.28,
        "algorithm.dual_clip": 0.0,
        "algorithm.aggregation": "token-mean",
        "rollout.dynamic_sampling": True,
        "reward.overlong_buffer_tokens": 2000,
        "reward.overlong_penalty": 1.0,
    },
    "gspo": {
        **GRPO,
        "algorithm.ratio": "sequence",
        "algorithm.clip_low": 3e-4,
        "algorithm.clip_high": 4e-4,
        "algorithm.dual_clip": 0.0,
    },
    "cispo": {
        **GRPO,
        "algorithm.objective": "cispo",
        "algorithm.clip_low": 1.0,
        "algorithm.clip_high": 4.0,
        "algorithm.dual_clip": 0.0,
        "algorithm.aggregation": "token-mean",
    },
    "sapo": {
        **GRPO,
        "algorithm.objective": "sapo",
        "algorithm.sapo_tau_positive": 1.0,
        "algorithm.sapo_tau_negative": 1.05,
        "algorithm.dual_clip": 0.0,
    },
    "gmpo": {
        **GRPO,
        "algorithm.objective": "gmpo",
        "algorithm.ratio": "sequence",
        "algorithm.clip_low": pytest.approx(1 - math.exp(-0.4), abs=1e-6),
        "algorithm.clip_high": pytest.approx(math.exp(0.4) - 1, abs=1e-6),
        "algorithm.dual_clip": 0.0,
    },
    "dr_grpo": {
        **GRPO,
        "algorithm.normalize_by_std": False,
        "algorithm.dual_clip": 0.0,
        "algorithm.aggregation": "seq-mean-token-sum-norm",
    },
    "gcpo": {
        **GRPO,
        "algorithm.token_credit": "gcpo",
        "algorithm.contrast.level": "token",
        "algorithm.contrast.top_share": 0.4,
        "algorithm.contrast.top_mass": 0.8,
        "algorithm.clip_high": 0.28,
        "algorithm.dual_clip": 0.0,
        "algorithm.aggregation": "token-mean",
        "rollout.dynamic_sampling": True,
    },
    "igpo": {**GRPO, "algorithm.advantage": "igpo_joint", "algorithm.gamma": 1.0, "algorithm.dual_clip": 0.0},
    "igpo_tg": {**A2TGPO, "algorithm.rescale": False, "algorithm.clip_beta": 0.0},
    "igpo_tg_rescaled": {**A2TGPO, "algorithm.clip_beta": 0.0},
    "a2tgpo": A2TGPO,
    "a2tgpo_released": {
        **A2TGPO,
        "algorithm.alpha": 0.3,
        "algorithm.aggregation": "token-mean",
        "algorithm.failed_calls": "count",
        "rollout.gain.measure": "log_probability",
    },
    "hgpo": {
        **GRPO,
        "algorithm.advantage": "hgpo",
        "algorithm.clip_high": 0.2,
        "algorithm.gamma": 0.95,
        "algorithm.alpha": 1.0,
        "algorithm.aggregation": "token-mean",
        "algorithm.kl_coef": 0.01,
        "algorithm.dual_clip": 3.0,
    },
    "mt_grpo": {
        **GRPO,
        "algorithm.advantage": "mt_grpo",
        "algorithm.alpha": 1.0,
        "algorithm.dual_clip": 0.0,
        "algorithm.aggregation": "token-mean",
    },
    "gtpo": {
        **GRPO,
        "algorithm.advantage": "gtpo",
        "algorithm.gamma": 0.9,
        "algorithm.alpha": 1.0,
        "algorithm.dual_clip": 0.0,
        "algorithm.clip_high": 0.28,
        "algorithm.aggregation": "token-mean",
    },
    "at2po": {
        **A2TGPO,
        "algorithm.advantage": "at2po",
        "algorithm.clip_beta": 0.0,
        "rollout.tree.initial": 10,
        "rollout.tree.rounds": 2,
        "rollout.tree.choice": "entropy",
        "rollout.tree.sibling_penalty": 0.05,
    },
    "tree_grpo": {
        **GRPO,
        "algorithm.advantage": "tree_grpo",
        "algorithm.dual_clip": 0.0,
        "algorithm.kl_coef": 1e-3,
        "algorithm.kl_estimator": "k3",
        "rollout.tree.initial": 2,
        "rollout.tree.rounds": 1,
        "rollout.tree.choice": "random",
    },
    "appo": {
        **GRPO,
        "algorithm.advantage": "appo",
        "algorithm.token_credit": "appo",
        "algorithm.future.half_life": 64,
        "algorithm.future.upper": 0.2,
        "algorithm.future.weight": 1.0,
        "algorithm.clip_high": 0.28,
        "algorithm.dual_clip": 3.0,
        "algorithm.aggregation": "token-mean",
        "rollout.inner_branches": 8,
    },
    "turn_group_absent": {**A2TGPO, "algorithm.advantage": "turn_group_absent"},
    "gigpo": {
        **GRPO,
        "algorithm.advantage": "gigpo",
        "algorithm.clip_high": 0.28,
        "algorithm.gamma": 0.95,
        "algorithm.alpha": 1.0,
        "algorithm.dual_clip": 0.0,
    },
}
# The quickstart's responses are shorter than DAPO's 2000 tokens, and its groups too small for AT2PO's tree, so the
# files themselves are checked with long responses and large groups.
ROOM = ["rollout.max_response_tokens=6192", "rollout.group_size=22"]


def flat_keys(mapping: dict, prefix: str = "") -> set[str]:
    keys = set()
    for name, value in mapping.items():
        keys |= flat_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return keys


def value_of(config, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def refusal(*arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_preset_has_expected_values():
    assert set(PRESETS) == set(EXPECTED)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_over_an_experiment_gives_the_method(name):
    plain = load_config(EXPERIMENT, ROOM)
    config = load_config(EXPERIMENT, [*ROOM, str(PRESETS[name])])
    for key, value in EXPECTED[name].items():
        assert value_of(config, key) == value, key
    for section in ("run", "model", "data", "search", "evaluation", "warmstart"):
        assert getattr(config, section) == getattr(plain, section)
    assert dataclasses.replace(config.update, extrapolation=plain.update.extrapolation) == plain.update


def test_presets_write_out_all_that_tells_methods_apart():
    keys = {name: flat_keys(yaml.safe_load(path.read_text())) for name, path in PRESETS.items()}
    assert all(written == keys["a2tgpo"] for written in keys.values())
    fields = {f"algorithm.{field.name}" for field in dataclasses.fields(AlgorithmConfig)}
    # Presets leave out settings that suit any method. The correction depends on the engine, and the signal of a turn
    # on the task. The entropy settings and the floor of the gain spread depend on the run. Presets also leave out
    # HGPO's length of history, SAPO's temperatures, GCPO's contrast and APPO's influence of later tokens, which no
    # other method reads.
    of_the_run = tuple(
        f"algorithm.{name}"
        for name in (
            *(
                "correction",
                "turn_signal",
                "entropy_",
                "clip_cov_",
                "gain_spread_floor",
                "hgpo_history",
                "sapo_",
                "contrast",
                "future",
            ),
        )
    )
    of_methods = {field for field in fields if not field.startswith(of_the_run)}
    assert {key for key in keys["a2tgpo"] if key.startswith("algorithm.")} == of_methods


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_is_left_of_a_preset_under_another(name):
    alone = load_config(EXPERIMENT, [*ROOM, str(PRESETS[name])])
    for other in PRESETS:
        over = load_config(EXPERIMENT, [*ROOM, str(PRESETS[other]), str(PRESETS[name])])
        assert over == alone, other


def test_the_default_is_the_paper():
    config = load_config(EXPERIMENT, [str(PRESETS["a2tgpo"])])
    assert config.algorithm == AlgorithmConfig()


def test_dapo_asks_runs_of_short_responses_for_their_own_buffer():
    message = refusal(EXPERIMENT, [str(PRESETS["dapo"])])
    assert message.startswith(f"{PRESETS['dapo']}: reward.overlong_buffer_tokens is 2000; allowed: below")
    config = load_config(EXPERIMENT, [str(PRESETS["dapo"]), "reward.overlong_buffer_tokens=96"])
    assert config.reward.overlong_buffer_tokens == 96


def test_at2po_asks_runs_of_small_groups_for_their_own_tree():
    message = refusal(EXPERIMENT, [str(PRESETS["at2po"])])
    assert message.startswith(
        f"{PRESETS['at2po']}: rollout.tree.initial is 10; allowed: below rollout.group_"
    )
    assert load_config(EXPERIMENT, [str(PRESETS["at2po"]), "rollout.tree.initial=4"]).rollout.tree.is_on


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_has_a_tree_exactly_if_it_compares_branches(name):
    needs_tree = name in OF_TREES
    wrong = f"rollout.tree.initial={0 if needs_tree else 4}"
    rule = ">= 1 with algorithm.advantage=" if needs_tree else "0 with algorithm.advantage="
    config = load_config(EXPERIMENT, [*ROOM, str(PRESETS[name]), wrong])
    with pytest.raises(ConfigError, match=f"{wrong.replace('=', ' is ')}; allowed: {rule}"):
        config.check_training()


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_has_inner_branches_exactly_if_it_uses_their_outcomes(name):
    needs_branches = name in OF_INNER_BRANCHES
    wrong = f"rollout.inner_branches={0 if needs_branches else 4}"
    off = (
        []
        if needs_branches
        else ["rollout.tree.initial=0", "algorithm.advantage=grpo", "algorithm.clip_beta=0"]
    )
    config = load_config(EXPERIMENT, [*ROOM, str(PRESETS[name]), *off, wrong])
    rule = ">= 1 with algorithm.advantage=" if needs_branches else "0 with algorithm.advantage="
    with pytest.raises(ConfigError, match=f"{wrong.replace('=', ' is ')}; allowed: {rule}"):
        config.check_training()


def test_later_arguments_win_whether_file_or_value(tmp_path):
    write(tmp_path / "sub" / "under.yaml", "rollout: {group_size: 2, max_turns: 2}\nalgorithm: {gamma: 0.2}")
    first = write(tmp_path / "sub" / "first.yaml", "base: under.yaml\nrollout: {group_size: 3}")
    second = write(tmp_path / "second.yml", "rollout: {temperature: 0.5}\nalgorithm: {gamma: 0.3}")

    def values(*overrides):
        config = load_config(EXPERIMENT, overrides)
        rollout = config.rollout
        return rollout.group_size, rollout.max_turns, rollout.temperature, config.algorithm.gamma

    assert values() == (8, 4, 1.0, 1.0)
    assert values(first) == (3, 2, 1.0, 0.2)
    assert values(first, second) == (3, 2, 0.5, 0.3)
    assert values(second, first) == (3, 2, 0.5, 0.2)
    assert values("rollout.group_size=5", "rollout.max_turns=6", first) == (3, 2, 1.0, 0.2)
    assert values(first, "rollout.group_size=5", second, "algorithm.gamma=0.9") == (5, 2, 0.5, 0.9)


def test_a_value_may_look_like_a_file():
    assert load_config(EXPERIMENT, ["run.name=trial.yaml"]).run.name == "trial.yaml"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("algorithm: {gama: 1}", "unknown key algorithm.gama; nearest valid key: algorithm.gamma"),
        ("algorithm: {gamma: 2}", "algorithm.gamma is 2.0; allowed: in [0, 1]"),
        ("algorithm: {gamma: high}", "algorithm.gamma is 'high'; allowed: a finite number"),
        (
            "algorithm: {advantage: grop}",
            "algorithm.advantage is 'grop'; allowed: appo | at2po | gigpo | grpo | gtpo | hgpo",
        ),
        ("- grpo", "list found; a configuration is a mapping"),
        ("algorithm: {gamma: 1", "not valid YAML"),
        ("base: gone.yaml", "base: no configuration file"),
    ],
)
def test_a_fault_in_a_file_among_the_arguments_names_that_file(tmp_path, text, says):
    path = write(tmp_path / "method.yaml", text)
    message = refusal(EXPERIMENT, [path])
    assert message.startswith(path) and says in message


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = str(tmp_path / "gpro.yaml")
    assert refusal(EXPERIMENT, [path]) == f"no configuration file {path}; give an existing YAML file"
    assert "'grpo' has no value; write section.field=value or name a .yaml file" in refusal(
        EXPERIMENT, ["grpo"]
    )


def test_reading_a_configuration_imports_neither_torch_nor_a_method():
    code = (
        "import sys; from a2tgpo.config.load import load_config;"
        "load_config('configs/quickstart.yaml', ['configs/algorithm/gigpo.yaml']);"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('a2tgpo.advantage.methods.')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_experiment_loads(path):
    assert load_config(path).run.name


def test_the_methods_of_the_ablation_differ_in_the_advantage_alone():
    may_differ = {"advantage", "alpha", "failed_calls", "gain_spread_floor"}
    common = ROOT / "configs" / "ablation.yaml"
    plain = load_config(common)
    files = sorted((ROOT / "configs" / "ablation").glob("*.yaml"))
    assert len(files) >= 5
    for path in files:
        config = load_config(common, [str(path)])
        changed = {
            name for name, value in vars(config.algorithm).items() if value != vars(plain.algorithm)[name]
        }
        assert changed <= may_differ, path
        rollout = dataclasses.replace(config.rollout, gain=plain.rollout.gain)
        assert dataclasses.replace(config, algorithm=plain.algorithm, rollout=rollout) == plain, path
