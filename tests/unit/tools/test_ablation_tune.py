"""Tuning with a real program in place of the launcher. Its best setting is known."""

import csv
import sys
from pathlib import Path

import pytest
import yaml
from tune import main

LAUNCHER = [sys.executable, str(Path(__file__).with_name("tuning_launcher.py"))]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def tune(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*arguments: str, methods: str = "a2tgpo") -> int:
        config = str(ROOT / "configs/quickstart.yaml")
        folders = ["--out", str(tmp_path / "trials"), "--write", str(tmp_path / "tuned")]
        (tmp_path / "trials").mkdir(exist_ok=True)
        return main([config, "--methods", methods, *folders, "run.steps=4", *arguments], launcher=LAUNCHER)

    return run


def starts(tmp_path: Path) -> list[str]:
    return (tmp_path / "trials" / "starts.txt").read_text().splitlines()


def choice(tmp_path: Path, method: str = "a2tgpo") -> dict:
    return yaml.safe_load((tmp_path / "tuned" / f"{method}.yaml").read_text())


def test_the_peak_of_the_second_half_is_chosen_and_every_trial_is_written_down(tune, tmp_path):
    assert tune("--jobs", "2", methods="a2tgpo,gspo") == 0
    expected = {"update": {"lr": 2e-4}, "algorithm": {"clip_low": 0.1, "clip_high": 0.133333}}
    assert choice(tmp_path) == choice(tmp_path, "gspo") == expected
    rows = list(csv.DictReader((tmp_path / "tuned" / "tuning.csv").open()))
    assert (
        len(rows) == len(starts(tmp_path)) == 10
    )  # three rates and two further clip ranges for each of two methods
    assert max(rows, key=lambda row: float(row["train_reward"]))["clip_low"] == "0.1"


def test_a_second_start_repeats_nothing_and_chooses_the_same(tune, tmp_path):
    assert tune() == 0
    first, text = starts(tmp_path), (tmp_path / "tuned" / "a2tgpo.yaml").read_text()
    assert tune() == 0
    assert starts(tmp_path) == first and (tmp_path / "tuned" / "a2tgpo.yaml").read_text() == text


def test_trials_of_another_configuration_are_refused(tune, tmp_path, capsys):
    assert tune() == 0
    assert tune("rollout.group_size=4") == 2
    error = capsys.readouterr().err
    assert "was started with rollout.group_size=8, but it is now 4" in error and error.count("\n") == 1


def test_what_the_file_of_a_method_says_besides_is_used_and_kept(tune, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "dapo.yaml").write_text("reward: {overlong_buffer_tokens: 96}\n")
    assert (
        tune(methods="dapo") == 0
    )  # the preset's 1024 tokens are longer than this configuration's responses
    kept = choice(tmp_path, "dapo")
    assert kept["reward"] == {"overlong_buffer_tokens": 96} and kept["update"] == {"lr": 2e-4}
    assert kept["algorithm"] == {"clip_low": 0.07, "clip_high": 0.098}


def test_failed_trials_lose_and_a_method_without_any_other_is_refused(tune, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "lr0.0002")
    assert tune() == 0
    assert choice(tmp_path)["update"] == {"lr": 1e-4}
    monkeypatch.setenv("FAILS", "igpo")
    assert tune(methods="igpo") == 2
    assert "--methods is 'igpo'; allowed: methods with at least one finished trial" in capsys.readouterr().err
    assert not (tmp_path / "tuned" / "igpo.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--jobs", "0"], "--jobs is 0; allowed: >= 1"), (["update.lrr=1"], "unknown key update.lrr")],
)
def test_mistakes_are_one_line(tune, capsys, arguments, says):
    assert tune(*arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
