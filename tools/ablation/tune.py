"""Find each method's learning rate and clipping range on one experiment, with the same protocol for all methods.

    python tools/ablation/tune.py CONFIG --methods grpo,igpo,a2tgpo --out DIR --write configs/ablation [--jobs J]
                                  [--ranks R] [section.field=value ...]

The program first tries every learning rate of LEARNING_RATES with the middle clipping range of CLIP_LOW. Then it
tries the other clipping ranges with the best learning rate. A trial is one short run with a seed that no comparison
uses. A trial's score is the mean reward on training questions over the second half of its steps. --write names a
folder. The program writes each method's choice to METHOD.yaml in this folder, and every trial to tuning.csv. Other
settings that METHOD.yaml already has are kept, and also apply to the trials. Finished trials are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from compare import LAUNCHER, refuse_other_config

from a2tgpo.config.expand import text_argument
from a2tgpo.config.load import load_config
from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.errors import require
from a2tgpo.io.program import add_overrides
from a2tgpo.metrics.writer import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
LEARNING_RATES = (1e-4, 2e-4, 4e-4)
CLIP_LOW = {"token": (0.07, 0.2, 0.6), "turn": (0.01, 0.03, 0.1), "sequence": (0.01, 0.03, 0.1)}
"""{level of the importance ratio: values of clip_low to try}. clip_high changes in proportion to clip_low."""
SEED = 100


@dataclass(frozen=True, kw_only=True)
class Trial:
    method: str
    lr: float
    clip_low: float
    clip_high: float

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.lr:g}-clip{self.clip_low:g}"

    @property
    def settings(self) -> dict[str, float]:
        return {
            "update.lr": self.lr,
            "algorithm.clip_low": self.clip_low,
            "algorithm.clip_high": self.clip_high,
        }


class Tuner:
    """Run trials, at most --jobs at a time, and keep their scores."""

    def __init__(self, args: argparse.Namespace, launcher: Sequence[str]):
        self._args = args
        self._launcher = launcher
        self.scores: dict[Trial, float] = {}

    def command(self, trial: Trial) -> list[str]:
        values = {
            **trial.settings,
            "run.seed": SEED,
            "run.name": trial.name,
            "run.root": self._args.out,
            "evaluation.every": 0,
            "evaluation.at_start": "false",
            "evaluation.max_questions": 2,
        }
        return [
            *self._launcher, "-n", str(self._args.ranks), self._args.config,
            *files_of(trial.method, self._args.write), *self._args.overrides,
            *(f"{key}={value}" for key, value in values.items()),
        ]  # fmt: skip

    def play(self, trials: Sequence[Trial]) -> None:
        """Run every trial that has no score yet, and store its score. The score of a failed trial is -inf."""
        todo = [trial for trial in trials if trial not in self.scores]
        with ThreadPoolExecutor(self._args.jobs) as pool:
            for trial, score in zip(todo, pool.map(self._score, todo), strict=True):
                self.scores[trial] = score
                print(f"{trial.name}: {score:.3f}", flush=True)

    def best(self, trials: Sequence[Trial]) -> Trial:
        """Return the first trial that has the highest score. Raise ConfigError if all trials failed."""
        best = max(trials, key=lambda trial: self.scores[trial])
        require(
            math.isfinite(self.scores[best]),
            "--methods",
            best.method,
            "methods with at least one finished trial",
        )
        return best

    def _score(self, trial: Trial) -> float:
        folder = Path(self._args.out) / trial.name
        command = self.command(trial)
        config = load_config(self._args.config, command[command.index(self._args.config) + 1 :])
        refuse_other_config(folder, config)
        if len(rewards(folder)) < config.run.steps:
            folder.mkdir(parents=True, exist_ok=True)
            environment = os.environ | {"PYTHON": sys.executable}
            with (folder / "log.txt").open("w", encoding="utf-8") as log:
                done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
            if done.returncode:
                print(f"{trial.name} failed: see {folder / 'log.txt'}", file=sys.stderr)
                return -math.inf
        last = rewards(folder)[config.run.steps // 2 :]
        return sum(last) / len(last)


def rewards(folder: Path) -> list[float]:
    """Return the mean reward of all played trajectories for each recorded step."""
    name = "sampling/reward_all_mean"  # recorded only if dynamic sampling drops groups
    records = read_metrics(folder / METRICS_FILE)
    return [record.get(name, record["reward/mean"]) for record in records if "reward/mean" in record]


def preset(method: str) -> Path:
    return ROOT / "configs" / "algorithm" / f"{method}.yaml"


def files_of(method: str, folder: str) -> list[str]:
    """Return the path of the method's preset and, if it exists, of the method's YAML file in `folder`."""
    own = Path(folder) / f"{method}.yaml"
    return [str(preset(method)), *([str(own)] if own.exists() else [])]


def trials_of(method: str) -> tuple[list[Trial], list[float]]:
    """Return the trials that compare learning rates, and the values of clip_low to try after these trials."""
    algorithm = yaml.safe_load(preset(method).read_text(encoding="utf-8"))["algorithm"]
    ranges = CLIP_LOW[algorithm["ratio"]]
    middle = ranges[len(ranges) // 2]
    clip_high = scaled(middle, algorithm["clip_high"] / algorithm["clip_low"])
    trials = [Trial(method=method, lr=lr, clip_low=middle, clip_high=clip_high) for lr in LEARNING_RATES]
    return trials, [clip for clip in ranges if clip != middle]


def scaled(clip_low: float, proportion: float) -> float:
    return round(clip_low * proportion, 6)


def with_clip(trial: Trial, clip_low: float) -> Trial:
    """Return `trial` with the given `clip_low`, and `clip_high` changed by the same factor."""
    clip_high = scaled(clip_low, trial.clip_high / trial.clip_low)
    return dataclasses.replace(trial, clip_low=clip_low, clip_high=clip_high)


def tune(args: argparse.Namespace, launcher: Sequence[str]) -> None:
    tuner = Tuner(args, launcher)
    first = {method: trials_of(method) for method in args.methods}
    tuner.play([trial for trials, _ in first.values() for trial in trials])
    all_trials = {}
    for method, (trials, clips) in first.items():
        best = tuner.best(trials)
        all_trials[method] = trials + [with_clip(best, clip) for clip in clips]
    tuner.play([trial for trials in all_trials.values() for trial in trials])
    for trials in all_trials.values():
        write_choice(tuner.best(trials), Path(args.write))
    write_table(tuner.scores, Path(args.write) / "tuning.csv")


def write_choice(trial: Trial, folder: Path) -> None:
    """Write the tuned values of `trial` to the method's YAML file in `folder`. Keep the file's other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{trial.method}.yaml"
    sections: dict[str, dict] = (
        (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    )
    for key, value in trial.settings.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    text = f"# Chosen by tools/ablation/tune.py; its trials are in tuning.csv.\n{yaml.safe_dump(sections)}"
    write_text(path, text)


def write_table(scores: dict[Trial, float], path: Path) -> None:
    """Write one row per trial to `path`. Keep the rows of methods that were not tuned this time."""
    rows: dict[tuple[str, ...], list] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as handle:
            rows = {tuple(row[:3]): row for row in list(csv.reader(handle))[1:]}
    for trial, score in scores.items():
        row = [trial.method, f"{trial.lr:g}", f"{trial.clip_low:g}", f"{trial.clip_high:g}", f"{score:.4f}"]
        rows[tuple(row[:3])] = row
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["method", "lr", "clip_low", "clip_high", "train_reward"])
    writer.writerows(rows[key] for key in sorted(rows))
    write_text(path, table.getvalue())


def main(argv: Sequence[str] | None = None, *, launcher: Sequence[str] = LAUNCHER) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="YAML file of the experiment")
    parser.add_argument("--methods", required=True, type=lambda text: text.split(","))
    parser.add_argument("--out", type=text_argument, required=True, help="folder of the trials' runs")
    parser.add_argument(
        "--write", type=text_argument, required=True, help="folder that receives METHOD.yaml and tuning.csv"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    try:
        for method in args.methods:
            require(preset(method).exists(), "--methods", method, "names of files in configs/algorithm")
        for name in ("jobs", "ranks"):
            require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), ">= 1")
        tune(args, launcher)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
