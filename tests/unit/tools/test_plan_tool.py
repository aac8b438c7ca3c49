"""tools/plan.py, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from plan import main
from tiny_models import build_model

from a2tgpo.plan.dimensions import read_dimensions
from a2tgpo.plan.parameters import checkpoint_parameters

ROOT = Path(__file__).parents[3]
CONFIG_70B = str(ROOT / "configs/train_70b.yaml")


def test_a_plan_that_fits(capsys, tmp_path):
    out = tmp_path / "plan.json"
    assert main([CONFIG_70B, "--gpus", "64", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "fits in every phase" in text
    assert "72,706,203,648 parameters" in text
    written = json.loads(out.read_text())
    assert written["parameters"] == 72_706_203_648
    assert sum(written["seconds"].values()) == pytest.approx(written["step_seconds"], abs=0.05)
    for phase in written["memory_bytes"].values():
        assert sum(phase["parts"].values()) == pytest.approx(phase["peak"], abs=20)


def test_the_example_in_the_documentation_is_what_the_tool_prints(capsys):
    main([CONFIG_70B, "--gpus", "64", "--model", "qwen2.5-72b"])
    _, plan = capsys.readouterr().out.split("\n", 1)  # the first line names the source of the dimensions
    assert plan in (ROOT / "docs/parallelism.md").read_text()


def test_a_plan_that_does_not_fit_says_which_phase_and_what_to_change(capsys):
    assert main([CONFIG_70B, "--gpus", "64", "parallel.pipeline=1"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DOES NOT FIT: update")]
    assert len(lines) == 1
    assert lines[0].endswith("set model.recompute=full")


def test_mistakes_end_in_one_line(capsys):
    assert main([CONFIG_70B, "--gpus", "64", "parallel.tensor=3"]) == 2
    assert main([CONFIG_70B, "parallel.tensr=8"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--gpus", "many", "an integer >= 1"),
        ("--gpus", "0", "an integer >= 1"),
        ("--mean-prompt-tokens", "-5", "a finite number >= 1"),
        ("--mean-prompt-tokens", "nan", "a finite number >= 1"),
        ("--mean-response-tokens", "inf", "a finite number >= 1"),
        ("--mean-response-tokens", "0", "a finite number >= 1"),
        ("--sampled-share", "2", "a number in (0, 1]"),
        ("--sampled-share", "half", "a number in (0, 1]"),
    ],
)
def test_a_number_that_plans_nothing_is_refused_with_what_is_allowed(option, value, allowed, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([CONFIG_70B, option, value])
    assert f"argument {option}: {value!r}; allowed: {allowed}" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "plan.json", "a\0b"):
        assert main([CONFIG_70B, "--gpus", "64", "--json", str(place)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --json: cannot write ")


def test_overrides_may_be_files_and_stand_behind_options(capsys):
    preset = str(ROOT / "configs/algorithm/grpo.yaml")
    assert main([CONFIG_70B, "--gpus", "64", preset, "model.recompute=full"]) == 0
    text = capsys.readouterr().out
    assert "recompute full" in text
    assert "reference  " in text  # GRPO's penalty needs one


def test_suggestions_are_printed_with_overrides(capsys):
    assert main([CONFIG_70B, "--gpus", "64", "--suggest"]) == 0
    assert "the first one: parallel.tensor=8" in capsys.readouterr().out
    assert main([CONFIG_70B, "--gpus", "8", "--suggest"]) == 1
    assert "no layout fits" in capsys.readouterr().out


def test_dimensions_come_from_the_checkpoint_where_there_is_one(capsys, tmp_path):
    model = build_model("qwen3", vocab_size=250, tied=False)
    model.save_pretrained(tmp_path)
    assert checkpoint_parameters(read_dimensions(str(tmp_path))) == model.num_parameters()
    # It has too few channels for FP8.
    assert main([CONFIG_70B, f"model.path={tmp_path}", "parallel.tensor=2", "parallel.pipeline=2",
                 "rollout.tensor_parallel=1", "--gpus", "4"]) == 0  # fmt: skip
    assert f"{tmp_path}/config.json" in capsys.readouterr().out


def test_a_plan_is_made_without_torch():
    code = (
        f"import sys; sys.argv = ['plan.py', {CONFIG_70B!r}]; from plan import main; main(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_ended_ends_it_without_a_word():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / "tools/plan.py"), CONFIG_70B, "--suggest"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (-signal.SIGPIPE, "")
