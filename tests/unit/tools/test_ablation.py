"""The comparison of methods: statistics by hand, reports of known runs, and which runs are repeated."""

import csv
import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path

import method_facts
import pytest
from advantage_facts import METHODS, equal_groups, facts, facts_text
from compare import PRESETS, main
from contrast_figure import write_contrasts
from contrasts import contrasts_text, holm
from needless import write_needless
from preloaded.command import PYTHON
from report import write_report
from seed_statistics import estimate, paired_difference, t_quantile
from turn_signals import needless_signals

from a2tgpo.config.load import dump_config, load_config
from a2tgpo.record.rollout_files import part_path, write_part
from a2tgpo.trajectory import Call, Trajectory, Turn
from runs import Plan, Run

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
LAUNCHER = [PYTHON, str(Path(__file__).with_name("ablation_launcher.py"))]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# statistics


@pytest.mark.parametrize(
    ("degrees", "printed"), [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (30, 2.042)]
)
def test_t_quantiles_are_those_of_printed_tables(degrees, printed):
    assert t_quantile(degrees) == pytest.approx(printed, abs=5e-4)


def test_estimate_of_three_values_by_hand():
    result = estimate([1.0, 2.0, 3.0])
    assert (result.mean, result.count) == (2.0, 3)
    assert result.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)  # variance 1
    assert result.text() == "2.000 ± 2.484"
    assert not result.excludes_zero


def test_paired_difference_takes_the_seeds_that_both_have():
    result = paired_difference({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.5, 3: 0.1})
    assert result.count == 2  # 0.1 and 0.2: standard deviation 0.1 / sqrt 2
    assert result.mean == pytest.approx(0.15)
    assert result.half_width == pytest.approx(12.7062 * 0.05, rel=1e-5)


def test_p_values_and_the_correction_by_holm_by_hand():
    # Two values 1 and 3: mean 2, standard error 1, t = 2 with one degree of freedom: 1 - 2/pi arctan 2.
    assert estimate([1.0, 3.0]).p_value == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    assert (estimate([1.0]).p_value, estimate([0.0, 0.0]).p_value, estimate([1.0, 1.0]).p_value) == (
        None,
        1,
        0,
    )
    assert holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


# reports of runs with known numbers


def write_run(
    run: Run, scores: dict[int, float], *, steps: int, trained: dict[str, float] | None = None
) -> None:
    """Write a run's folder with `scores` by step, and metrics `trained` in every training step up to the last
    score.
    """
    arguments = [
        str(PRESETS / f"{run.method}.yaml"),
        f"run.name={run.name}",
        f"run.root={run.folder.parent}",
        f"run.seed={run.seed}",
        f"run.steps={steps}",
        "reward.overlong_buffer_tokens=0",
    ]
    run.folder.mkdir(parents=True)
    run.config_file.write_text(dump_config(load_config(CONFIG, arguments)))
    lines = []
    for step in range(max(scores) + 1):
        record = {"step": step} | ({"time/step_s": 2.0, **(trained or {})} if step else {})
        if step in scores:
            hops = {"evaluation/em_1_hops": scores[step] + 0.1, "evaluation/em_2_hops": scores[step] - 0.1}
            record |= {"evaluation/em": scores[step], "evaluation/num_questions": 8, "time/evaluation_s": 1.0}
            record |= hops
        lines.append(json.dumps(record) + "\n")
    run.metrics_file.write_text("".join(lines))


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """Runs: two of grpo, one finished and one failed of a2tgpo, one of dapo, one of igpo without its last
    evaluation.
    """
    out = tmp_path_factory.mktemp("compared")
    trained = {"speed/sampled_tokens": 100.0, "reward/mean": 0.5, "entropy/mean": 1.0}
    scores = {
        ("grpo", 0): {0: 0.25, 1: 0.5, 2: 0.25, 3: 0.75, 4: 0.5},
        ("grpo", 1): {0: 0.25, 1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5},
        ("a2tgpo", 0): {0: 0.25, 1: 0.5, 2: 0.625, 3: 0.75, 4: 0.875},
        ("a2tgpo", 1): {0: 0.25, 1: 0.5},
        ("dapo", 0): {0: 0.25, 4: 0.5},
        ("igpo", 0): {0: 0.25, 3: 0.5},
    }
    for (method, seed), own in scores.items():
        more = {"sampling/groups_played": 48.0} if method == "dapo" else {}
        write_run(Run(method=method, seed=seed, out=out), own, steps=4, trained=trained | more)
    failed = Run(method="a2tgpo", seed=1, out=out)
    failed.log.parent.mkdir()
    failed.log.write_text("$ old\nerror: long mended\n$ new\nstep 1/4\nerror: no memory left\nbye\n\n")
    codes = {failed.name: 3, "igpo-seed0": 0}
    contrasts = ["dapo-grpo", "a2tgpo-grpo"]
    Plan(
        methods=["grpo", "a2tgpo", "dapo", "igpo"], seeds=[0, 1], contrasts=contrasts, exit_codes=codes
    ).save(out)
    write_report(out)
    return out


def test_results_hold_a_row_for_each_run(compared):
    rows = {(row["method"], row["seed"]): row for row in read_csv(compared / "results.csv")}
    assert len(rows) == 8
    row = rows["grpo", "0"]
    expected = {"first_em": 0.25, "final_em": 0.5, "best_em": 0.75, "last3_em": 0.5}
    expected |= {"em_1_hops": 0.6, "em_2_hops": 0.4, "steps": 4, "tokens": 400, "seconds": 4 * 2 + 5 * 1}
    expected |= {"groups": 4 * 32, "rollouts": 4 * 32 * 8}
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    assert row["f1"] == ""  # never recorded: empty, not 0
    assert (rows["dapo", "0"]["groups"], rows["dapo", "0"]["rollouts"]) == ("192", "1536")
    assert float(rows["dapo", "0"]["last3_em"]) == 0.5, "the untrained policy is no result of the method"
    for run, status in (
        (("a2tgpo", "1"), "failed"),
        (("igpo", "0"), "failed"),
        (("dapo", "1"), "unfinished"),
    ):
        assert (rows[run]["status"], rows[run]["final_em"]) == (status, "")


def test_report_states_intervals_differences_budgets_and_faults(compared):
    report = (compared / "report.md").read_text()
    lines = {
        line.split(" | ")[0].strip("| "): line for line in report.split("## Last evaluation")[0].splitlines()
    }
    half = 12.7062 * 0.125 / 2  # 0.75 and 0.5: standard deviation 0.25 / sqrt 2
    best = f"0.625 ± {2 * half:.3f}"
    assert lines["grpo"] == f"| grpo | 2 | 0.250 ± 0.000 | 0.500 ± 0.000 | {best} | 0.500 ± 0.000 |  |"
    assert lines["a2tgpo"].endswith("| 0.750 ± ? | +0.250 ± ? (n = 1) |")
    assert "igpo" not in lines, "a run without its last evaluation is in no table"
    assert "| dapo | 4 | 192 | 1,536 | 400 | 10 |" in report
    assert (
        "- a2tgpo-seed1 failed: step 1 of 4, exit code 3: error: no memory left (logs/a2tgpo-seed1.log)"
        in report
    )
    assert "- igpo-seed0 failed: step 3 of 4, exit code 0: no log" in report
    assert "- igpo-seed1 unfinished: not started" in report


def test_contrasts_compare_the_areas_under_the_curves_seed_by_seed(compared):
    report = (compared / "report.md").read_text().split("## Held-out exact match")[0]
    # grpo, seed 0: (0.25/2 + 0.5 + 0.25 + 0.75 + 0.5/2) / 4; a2tgpo: (0.25/2 + 0.5 + 0.625 + 0.75 + 0.875/2) / 4
    assert f"| a2tgpo - grpo | 1 | {2.4375 / 4 - 1.875 / 4:+.4f} ± ? | ? | ? |" in report
    assert f"| dapo - grpo | 1 | {0.375 - 1.875 / 4:+.4f} ± ? | ? | ? |" in report
    rows = {(row["method"], row["seed"]): row["area_em"] for row in read_csv(compared / "results.csv")}
    assert float(rows["grpo", "0"]) == 1.875 / 4 and rows["igpo", "0"] == ""


def test_contrasts_of_several_seeds_have_an_interval_and_corrected_p_values():
    scores = {"a": {0: 0.1, 1: 0.3, 2: 9.0}, "b": {0: 0.0, 1: 0.1}, "c": {0: 0.1, 1: 0.1}}
    first, second = contrasts_text(["a-b", "c-b"], scores).splitlines()[2:4]
    p = 1 - 2 / math.pi * math.atan(3.0)  # differences 0.1 and 0.2: mean 0.15, standard error 0.05
    assert first == f"| a - b | 2 | +0.1500 ± 0.6353 | {p:.3f} | {2 * p:.3f} |"
    assert second.startswith("| c - b | 2 | +0.0500 ± 0.6353 | 0.500 | 0.500 |")


def test_the_contrasts_of_several_seeds_are_drawn_and_the_others_are_left_out(tmp_path):
    scores = {"a": {0: 0.5, 1: 0.75, 2: 0.5}, "b": {0: 0.25, 1: 0.5, 2: 0.5}, "c": {0: 0.5}}
    assert write_contrasts(["c-a"], scores, tmp_path) == {} and not list(tmp_path.iterdir())
    assert list(write_contrasts(["a-b", "c-a"], scores, tmp_path)) == ["contrasts.png"]
    picture = (tmp_path / "contrasts.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000


def test_while_runs_are_left_only_the_tables_are_written(compared, tmp_path):
    shutil.copytree(compared, tmp_path / "copy")
    write_report(tmp_path / "copy")
    drawn = {path.name for path in (tmp_path / "copy").glob("*.png")}
    for path in [*(tmp_path / "copy").glob("*.png"), tmp_path / "copy" / "report.md"]:
        path.unlink()
    write_report(tmp_path / "copy", with_figures=False)
    assert "learning_curves.png" in drawn and not list((tmp_path / "copy").glob("*.png"))
    assert (tmp_path / "copy" / "report.md").exists()


def test_a_report_can_be_made_of_what_is_there(compared, tmp_path, capsys):
    assert main(["--report", str(compared)]) == 0
    assert capsys.readouterr().out.startswith("4 of 8 runs finished")
    assert main(["--report", str(tmp_path)]) == 2
    assert "has no ablation.json" in capsys.readouterr().err


# figures of rollouts with known signals


def rollout(prompt: int, sample: int, gains: list[float], *, reward: float) -> Trajectory:
    calls = [
        Turn(
            tokens=[1],
            rollout_logprobs=[0.0],
            observation_tokens=[2],
            calls=[Call(tool="search", arguments="q")],
            info_gain=gain,
        )
        for gain in gains
    ]
    return Trajectory(
        prompt_index=prompt,
        prompt_id=str(prompt),
        sample_index=sample,
        prompt_tokens=[0],
        turns=[*calls, Turn(tokens=[3], rollout_logprobs=[0.0])],
        stop_reason="answer",
        outcome_reward=reward,
        exact_match=float(sample % 4 == 0),
    )


def known_rollouts() -> list[Trajectory]:
    """Return 2 prompts x 16 rollouts x 2 calls. Gains are all combinations of 0 +- 0.1 and then 1 +- 0.1; all rewards
    are 0.5.
    """
    signs = [(a, b) for a in (-0.1, 0.1) for b in (-0.1, 0.1)] * 4
    return [
        rollout(prompt, sample, [first, 1 + second], reward=0.5)
        for prompt in (0, 1)
        for sample, (first, second) in enumerate(signs)
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Two methods with a single step and the same known rollouts."""
    out = tmp_path_factory.mktemp("drawn")
    for method in ("a2tgpo", "grpo"):
        run = Run(method=method, seed=0, out=out)
        write_run(run, {0: 0.25, 1: 0.5}, steps=1, trained={"turns/process_turns": 2.0})
        records = [trajectory.to_dict() | {"prompt_text": "?"} for trajectory in known_rollouts()]
        write_part(records, part_path(run.folder, 1, replica=0, num_replicas=1))
    Plan(methods=["a2tgpo", "grpo"], seeds=[0]).save(out)
    write_report(out)
    return out


def test_figure_4_measures_the_known_drift(drawn):
    drift = {row["signal"]: row for row in read_csv(drawn / "figure4_drift.csv")}
    # IGPO's pool of a prompt has 16 gains around 0, 16 around 1 and 16 rewards of 0.5: mean 0.5, variance 0.52 / 3.
    std = math.sqrt(0.52 / 3)
    assert float(drift["raw gain"]["drift"]) == pytest.approx(1.0)
    assert float(drift["IGPO gain"]["drift"]) == pytest.approx(1 / std, rel=1e-5)
    assert float(drift["A2TGPO gain"]["drift"]) == pytest.approx(0.0, abs=1e-9)
    assert float(drift["IGPO advantage"]["drift"]) == pytest.approx(0.5 / std, rel=1e-5)
    assert float(drift["A2TGPO advantage"]["drift"]) == pytest.approx(0.0, abs=1e-9)
    assert drift["raw gain"]["turns"] == "1 2"
    rows = {(row["signal"], row["turn"]): row for row in read_csv(drawn / "figure4.csv")}
    assert rows["raw gain", "2"]["count"] == "32"
    assert float(rows["raw gain", "2"]["mean"]) == pytest.approx(1.0)
    assert float(rows["raw gain", "2"]["std"]) == pytest.approx(0.1)


def test_figure_5_measures_the_known_spread(drawn):
    std = {(row["signal"], row["remaining"]): float(row["std"]) for row in read_csv(drawn / "figure5.csv")}
    # Normalised gains are independent with standard deviation 1, and outcomes do not vary.
    spread = [std[name, remaining] for name in ("sum", "rescaled") for remaining in "012"]
    assert spread == pytest.approx([0.0, 1.0, math.sqrt(2), 0.0, 1.0, 1.0], rel=1e-4, abs=1e-9)


def test_needless_searches_lower_the_advantage_of_pooled_gains_not_of_grouped_turns(
    tmp_path,
):
    """All answers to these one-hop questions are right, but every second rollout makes a needless second search."""
    batch = [
        dataclasses.replace(rollout(prompt, sample, [1.0, 0.0][: 1 + sample % 2], reward=1.0), hops=1)
        for prompt in (0, 1)
        for sample in range(32)
    ]
    columns = needless_signals(batch)
    assert columns["needless"].tolist() == [0, 1] * 32 and set(columns["reward"]) == {1.0}

    def mean(name: str, needless: int) -> float:
        return float(columns[name][columns["needless"] == needless].mean())

    # A prompt's pool has 32 gains of 1, 16 of 0 and 32 rewards of 1: mean 0.8, standard deviation 0.4. So a gain or
    # reward of 1 becomes 0.5 and a gain of 0 becomes -2. Each turn has the sum of its own and all later values.
    assert mean("IGPO", 0) == pytest.approx((1.0 + 0.5) / 2, rel=1e-5)
    assert mean("IGPO", 1) == pytest.approx((-1.0 - 1.5 + 0.5) / 3, rel=1e-5)
    assert mean("A2TGPO", 1) == pytest.approx(mean("A2TGPO", 0), abs=1e-6)
    assert mean("GRPO", 1) == pytest.approx(mean("GRPO", 0), abs=1e-6)
    caption = write_needless(columns, tmp_path, "rollouts by hand")
    assert "rollouts by hand" in caption and (tmp_path / "needless.png").stat().st_size > 10_000
    rows = {(row["signal"], row["needless"]): row for row in read_csv(tmp_path / "needless.csv")}
    assert rows["IGPO", "1"]["outcome"] == "right" and rows["IGPO", "1"]["count"] == "32"


def test_facts_of_methods_by_hand():
    """A group of two right answers; the first has a gain of 1, the second a gain of 0."""
    batch = [rollout(0, sample, [1.0 - sample], reward=1.0) for sample in (0, 1)]
    assert equal_groups([batch]) == (1, 1)
    names = ("grpo", "igpo", "igpo_separate", "a2tgpo")
    found = {name: facts([batch], METHODS[name]) for name in names}
    for name in names:
        # IGPO's pool has 1, 0, 1, 1: mean 3/4, deviation sqrt(3)/4, so an outcome of 1 counts 1 / sqrt 3.
        outcome = 1 / math.sqrt(3) if name == "igpo" else 0.0
        assert found[name]["all right"] == pytest.approx(outcome, abs=1e-4)
        gain = -1 / math.sqrt(3) if name == "igpo" else 0.0  # the mean of (1 and -3) / sqrt 3
        assert found[name]["process turns"] == pytest.approx(gain + outcome, abs=1e-4)
    assert found["a2tgpo"]["narrow"] == 0 and "narrow" not in found["grpo"]
    assert facts_text([batch]).startswith("In 1 of 1 groups (100%) all rollouts earned the same reward.")


def test_facts_of_recorded_rollouts_are_printed(drawn, tmp_path, capsys):
    program = str(ROOT / "tools" / "ablation" / "method_facts.py")
    assert method_facts.main([str(drawn / "runs" / "a2tgpo-seed0")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "In 2 of 2 groups (100%) all rollouts earned the same reward." and len(lines) == 10
    done = subprocess.run([PYTHON, program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and str(tmp_path) in done.stderr


def test_all_figures_are_drawn_and_named_in_the_report(drawn):
    report = (drawn / "report.md").read_text()
    for name in ("learning_curves", "figure4", "figure5", "figure10"):
        picture = (drawn / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
        assert f"]({name}.png)" in report
    assert (
        "rollouts of a2tgpo (seeds: 1, steps: 1), 64 turns" in report
    )  # grpo comes later but groups no turns


# playing runs


def compare(out: Path, *more: str) -> int:
    arguments = [CONFIG, "--methods", "grpo,a2tgpo", "--seeds", "0", "--out", str(out), "run.steps=2"]
    return main([*arguments, *more], launcher=LAUNCHER)


def attempts(out: Path, name: str) -> int:
    return (out / "logs" / f"{name}.log").read_text().count("$ ")


def test_finished_runs_are_left_alone_and_failed_ones_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "grpo-seed0:1")
    assert compare(tmp_path) == 1
    assert (
        "[1/2] grpo-seed0 failed: step 1 of 2, exit code 3: error: the engine is lost"
        in capsys.readouterr().err
    )
    assert "grpo-seed0 failed" in (tmp_path / "report.md").read_text()
    assert [row["status"] for row in read_csv(tmp_path / "results.csv")] == ["failed", "finished"]
    monkeypatch.delenv("FAILS")
    assert compare(tmp_path) == 0
    assert (attempts(tmp_path, "grpo-seed0"), attempts(tmp_path, "a2tgpo-seed0")) == (2, 1)
    assert [float(row["final_em"]) for row in read_csv(tmp_path / "results.csv")] == [0.5, 0.5]
    # Another call with one more seed keeps the first runs in the report.
    assert compare(tmp_path, "--seeds", "1", "--methods", "grpo") == 0
    assert (attempts(tmp_path, "grpo-seed0"), attempts(tmp_path, "grpo-seed1")) == (2, 1)
    finished = [
        (r["method"], r["seed"]) for r in read_csv(tmp_path / "results.csv") if r["status"] == "finished"
    ]
    assert finished == [("grpo", "0"), ("grpo", "1"), ("a2tgpo", "0")]


def test_a_run_begun_with_other_values_is_refused_before_anything_starts(tmp_path, capsys):
    write_run(Run(method="a2tgpo", seed=0, out=tmp_path), {0: 0.25, 2: 0.5}, steps=2)
    assert compare(tmp_path, "reward.overlong_buffer_tokens=0", "update.lr=0.5") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a2tgpo-seed0 was started with update.lr=0.0002, but it is now 0.5; give another --out" in line
    assert not (tmp_path / "logs").exists()


def test_each_seed_has_a_warm_start_of_its_own_before_its_runs(tmp_path, capsys):
    for seed in (0, 1):
        source = tmp_path / "warm_starts" / f"seed{seed}" / "source"
        source.mkdir(parents=True)
        (source / "config.json").write_text("{}")  # an interrupted warm start goes on from its source
    more = ["--warm-starts", "--seeds", "0,1", "--jobs", "2"]
    assert compare(tmp_path, *more) == 0
    for seed in (0, 1):
        configs = [
            load_config(tmp_path / "runs" / f"{method}-seed{seed}" / "config.yaml")
            for method in ("grpo", "a2tgpo")
        ]
        assert {config.model.path for config in configs} == {
            str(tmp_path / "warm_starts" / f"seed{seed}" / "model")
        }
    assert compare(tmp_path, *more) == 0
    assert attempts(tmp_path, "warm-start-seed0") == attempts(tmp_path, "grpo-seed0") == 1


def test_a_failed_warm_start_fails_its_runs_alone(tmp_path, capsys):
    source = tmp_path / "out" / "warm_starts" / "seed1" / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    data = tmp_path / "empty" / "train.jsonl"  # of which no tokenizer can be made
    config = tmp_path / "config.yaml"
    config.write_text(f"base: {CONFIG}\ndata:\n  train: {data}\n")
    arguments = [str(config), "--methods", "grpo", "--seeds", "0,1", "--warm-starts", "--out"]
    assert main([*arguments, str(tmp_path / "out"), "run.steps=2"], launcher=LAUNCHER) == 1
    err = capsys.readouterr().err
    assert "grpo-seed0 failed: not started, exit code 2: error: " in err and str(data.parent) in err
    assert "grpo-seed1 finished" in err


def test_jobs_are_played_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("MEETS", "grpo-seed0,a2tgpo-seed0")  # each run waits for the other
    assert compare(tmp_path, "--jobs", "2") == 0


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--methods", "grpo,ppo"], "--methods is 'ppo'; allowed: a2tgpo | "),
        (["--seeds", "0,x"], "--seeds is '0,x'; allowed: integers"),
        (["--jobs", "0"], "--jobs is 0; allowed: >= 1"),
        (
            ["--contrasts", "a2tgpo-igpo"],
            "--contrasts is 'a2tgpo-igpo'; allowed: METHOD-BASE with two of grpo",
        ),
        (["--warm-starts", "model.path=x"], "allowed: any key but run.name, run.root, run.seed, model.path"),
        (["run.seed=3"], "command line is 'run.seed=3'; allowed: any key but run.name, run.root, run.seed"),
        (["update.rl=1"], "unknown key update.rl"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(tmp_path, capsys, more, fault):
    assert compare(tmp_path / "out", *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fault in line
    assert not (tmp_path / "out").exists()
