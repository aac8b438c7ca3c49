"""Compare methods: train every method with every seed on one experiment, then write tables and figures.

    python tools/ablation/compare.py CONFIG --methods grpo,dapo,igpo,a2tgpo --seeds 0,1,2 --out DIR [--ranks R]
                             [--jobs J] [--presets FOLDER] [--warm-starts] [--contrasts METHOD-BASE,...]
                             [section.field=value ...]
    python tools/ablation/compare.py --report DIR

A run of the method NAME reads CONFIG and FOLDER/NAME.yaml, which overrides CONFIG. Runs with the same seed draw the
same questions, and sample with the same random seeds. With --warm-starts, each seed has its own initial policy, which
the program makes before the seed's first run. If you start the same command again, it skips finished runs and resumes
the other runs. A failed run does not stop the other runs. DIR contains runs/ and logs/, and with --warm-starts
also warm_starts/. Whenever a run ends, the program rewrites the tables in DIR: results.csv, curves.csv and report.md.
At the end it also writes the figures and tensorboard/. --report DIR only rewrites all these files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from progress import Job, Progress
from tqdm import tqdm
from warm_starts import WarmStart

from a2tgpo.config.expand import path_argument
from a2tgpo.config.load import config_to_dict, load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.program import add_overrides, exit_code
from runs import (
    ATTEMPT_MARK,
    CONFIG_FILE,
    PLAN_FILE,
    Plan,
    Run,
    RunResult,
    last_words,
    load_plan,
    read_result,
)

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (str(ROOT / "launch" / "local.sh"),)
PRESETS = ROOT / "configs" / "algorithm"
OWN_KEYS = ("run.name", "run.root", "run.seed")
"""Settings that this program sets for every run. The command line must not set them."""
WARM_START_KEYS = ("model.path", "warmstart.source")
"""Settings that --warm-starts sets."""
POLL_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Settings shared by all runs of a comparison."""

    config: str
    overrides: Sequence[str]
    presets: Path
    has_warm_starts: bool
    """Whether every seed has its own initial policy. If not, all runs start from `model.path`."""
    ranks: int
    launcher: Sequence[str]
    """The command that starts a run. It takes the same arguments as launch/local.sh."""

    def warm_start(self, run: Run) -> WarmStart | None:
        """Return the warm start that `run` needs, or None if it needs none."""
        return WarmStart(seed=run.seed, out=run.out) if self.has_warm_starts else None

    def arguments(self, run: Run) -> list[str]:
        """Return the launcher's arguments after CONFIG: the method's file, then `section.field=value` settings."""
        own = [f"run.name={run.name}", f"run.root={run.folder.parent}", f"run.seed={run.seed}"]
        if warm_start := self.warm_start(run):
            own.append(f"model.path={warm_start.model}")
        return [str(self.presets / f"{run.method}.yaml"), *own, *self.overrides]

    def command(self, task: Run | WarmStart) -> list[str]:
        if isinstance(task, WarmStart):
            data = Path(next(iter(load_config(self.config).data.train_files))).parent
            return task.command(self.launcher, self.config, data=data, overrides=self.overrides)
        return [*self.launcher, "-n", str(self.ranks), self.config, *self.arguments(task)]

    def check(self, run: Run) -> RunConfig:
        """Return the configuration for `run`. Raise ConfigError if the run was started with another configuration."""
        config = load_config(self.config, self.arguments(run))
        refuse_other_config(run.folder, config)
        return config


def refuse_other_config(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError if the run in `folder` was started with a configuration other than `config`."""
    if not (folder / CONFIG_FILE).exists():
        return
    recorded = dict(leaves(config_to_dict(load_config(folder / CONFIG_FILE))))
    for key, value in leaves(config_to_dict(config)):
        # run.root may differ from its recorded value, because the whole folder may have been moved.
        if key != "run.root" and recorded[key] != value:
            raise ConfigError(
                f"{folder} was started with {key}={recorded[key]!r}, but it is now {value!r}; "
                "give another --out, or remove that folder to repeat the run"
            )


def leaves(mapping: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) for every value of `mapping` that is not a dict, including the values of nested
    dicts."""
    for name, value in mapping.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def compare(experiment: Experiment, plan: Plan, out: Path, *, jobs: int) -> list[RunResult]:
    """Train all unfinished runs of `plan`, `jobs` at a time, and return the results of the runs that failed.

    Raises:
        ConfigError: before any run starts, if a configuration is wrong or has changed since an earlier start.
    """
    from style import MAX_METHODS

    runs = plan.runs(out)
    total_steps = sum(experiment.check(run).run.steps for run in runs)
    if (out / PLAN_FILE).exists():
        with contextlib.suppress(ConfigError):  # a damaged plan is overwritten below
            plan.widen(load_plan(out))
    require(
        len(plan.methods) <= MAX_METHODS,
        f"methods in {out}",
        ", ".join(plan.methods),
        f"at most {MAX_METHODS}, or another --out",
    )
    waiting = [run for run in runs if not read_result(run, None).is_finished]
    for run in waiting:
        plan.exit_codes.pop(run.name, None)
    plan.save(out)
    progress = Progress(runs, waiting, total_steps)
    try:
        return play(experiment, plan, waiting, progress, jobs=jobs)
    finally:
        progress.close()


def play(
    experiment: Experiment, plan: Plan, runs: Sequence[Run], progress: Progress, *, jobs: int
) -> list[RunResult]:
    """Train `runs` in order, `jobs` at a time, and rewrite the report when a run ends. Return the results of failed
    runs.

    A warm start comes before the first run that needs it. During a warm start, runs of other seeds may start.
    """
    waiting, running, failed = with_warm_starts(experiment, runs), list[Job](), list[RunResult]()
    try:
        while waiting or running:
            while len(running) < jobs and (task := next_task(experiment, waiting)) is not None:
                waiting.remove(task)
                slot = min(set(range(jobs)) - {job.slot for job in running})
                running.append(start(experiment, task, slot=slot, jobs=jobs))
            time.sleep(POLL_S)
            progress.look(running)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                ended = [job.task]
                if isinstance(job.task, WarmStart) and not job.task.is_finished:
                    ended += without_policy(experiment, job.task, waiting)
                    waiting = [task for task in waiting if task not in ended]
                for run in ended:
                    if isinstance(run, Run):
                        failed += end(plan, run, job.process.returncode, progress)
    finally:
        for job in running:
            job.process.terminate()  # torchrun ends its ranks on SIGTERM
        for job in running:
            job.process.wait()
    return failed


def without_policy(
    experiment: Experiment, warm_start: WarmStart, waiting: Sequence[Run | WarmStart]
) -> list[Run]:
    """Return the runs of `waiting` that need the failed `warm_start`, and write the reason into their logs."""
    runs = [task for task in waiting if isinstance(task, Run) and experiment.warm_start(task) == warm_start]
    for run in runs:
        with run.log.open("a", encoding="utf-8") as log:
            log.write(f"{ATTEMPT_MARK}{warm_start.name}\n{last_words(warm_start.log)}\n")
    return runs


def end(plan: Plan, run: Run, exit_code: int, progress: Progress) -> list[RunResult]:
    """Record that `run` ended, or that its warm start failed. Return [its result] if it did not finish, else []."""
    plan.exit_codes[run.name] = exit_code
    plan.save(run.out)
    result = read_result(run, exit_code)
    progress.end(result)
    report_so_far(run.out)
    return [] if result.is_finished else [result]


def with_warm_starts(experiment: Experiment, runs: Sequence[Run]) -> list[Run | WarmStart]:
    """Return `runs` with each unfinished warm start before the first run that needs it."""
    tasks: list[Run | WarmStart] = []
    for run in runs:
        warm_start = experiment.warm_start(run)
        if warm_start is not None and not warm_start.is_finished and warm_start not in tasks:
            tasks.append(warm_start)
        tasks.append(run)
    return tasks


def next_task(experiment: Experiment, waiting: Sequence[Run | WarmStart]) -> Run | WarmStart | None:
    """Return the first task that can start, or None if all runs wait for warm starts."""
    for task in waiting:
        warm_start = experiment.warm_start(task) if isinstance(task, Run) else None
        if warm_start is None or warm_start.is_finished:
            return task
    return None


def report_so_far(out: Path) -> None:
    """Write the report's tables. If that fails, only print the reason, so that the runs continue."""
    from report import write_report

    try:
        write_report(out, with_figures=False)
    except (OSError, ValueError) as error:
        tqdm.write(f"ablation: could not write the report: {error}", file=sys.stderr)


def start(experiment: Experiment, task: Run | WarmStart, *, slot: int, jobs: int) -> Job:
    """Start `task`, and append its output to its log. If there are enough cores, each task gets its own cores."""
    command = experiment.command(task)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("a", encoding="utf-8") as log:
        log.write(f"{ATTEMPT_MARK}{shlex.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHON": sys.executable},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    share = sorted(os.sched_getaffinity(0))
    share = share[slot * len(share) // jobs : (slot + 1) * len(share) // jobs]
    if jobs > 1 and len(share) >= experiment.ranks:
        with contextlib.suppress(ProcessLookupError):  # the process may have ended already
            os.sched_setaffinity(process.pid, share)
    return Job(task=task, slot=slot, process=process)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", help="YAML file of the experiment")
    parser.add_argument(
        "--methods", help="names from configs/algorithm, comma-separated; the first is the base"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", type=path_argument, help="folder of the comparison")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: %(default)s)")
    parser.add_argument(
        "--warm-starts", action="store_true", help="make an initial policy for each seed (tiny models only)"
    )
    parser.add_argument(
        "--contrasts", default="", help="differences that the report tests: METHOD-BASE, comma-separated"
    )
    parser.add_argument(
        "--presets", type=path_argument, default=PRESETS, help="folder of the methods (default: %(default)s)"
    )
    parser.add_argument(
        "--report", type=path_argument, metavar="DIR", help="only rewrite tables and figures of DIR"
    )
    add_overrides(parser)
    # `parse_args` would refuse overrides that follow options.
    return parser.parse_intermixed_args(argv)


def parse_plan(options: argparse.Namespace) -> Plan:
    """Check the command line, and return the plan with its methods and seeds."""
    for name in ("config", "methods", "out"):
        require(getattr(options, name) is not None, f"--{name}".replace("--config", "CONFIG"), None, "given")
    require(options.ranks >= 1, "--ranks", options.ranks, ">= 1")
    require(options.jobs >= 1, "--jobs", options.jobs, ">= 1")
    require(options.presets.is_dir(), "--presets", str(options.presets), "an existing folder")
    own_keys = OWN_KEYS + (WARM_START_KEYS if options.warm_starts else ())
    for override in options.overrides:
        key = override.partition("=")[0].strip()
        require(
            key not in own_keys,
            "command line",
            override,
            f"any key but {', '.join(own_keys)}, which this program sets",
        )
    methods = list(dict.fromkeys(options.methods.split(",")))
    known = sorted(path.stem for path in options.presets.glob("*.yaml"))
    for method in methods:
        require(method in known, "--methods", method, " | ".join(known) or f"*.yaml in {options.presets}")
    seeds = options.seeds.split(",")
    require(all(seed.isdecimal() for seed in seeds), "--seeds", options.seeds, "integers >= 0, like 0,1,2")
    contrasts = [text for text in options.contrasts.split(",") if text]
    for contrast in contrasts:
        pair = contrast.split("-")
        is_known = len(pair) == 2 and set(pair) <= set(methods)
        require(is_known, "--contrasts", contrast, f"METHOD-BASE with two of {', '.join(methods)}")
    return Plan(methods=methods, seeds=sorted({int(seed) for seed in seeds}), contrasts=contrasts)


def main(argv: Sequence[str] | None = None, *, launcher: Sequence[str] = LAUNCHER) -> int:
    options = parse_arguments(argv)
    try:
        return exit_code(lambda: work(options, launcher))
    except KeyboardInterrupt:
        print("ablation: interrupted; the same command continues", file=sys.stderr)
        return 130


def work(options: argparse.Namespace, launcher: Sequence[str]) -> int:
    """Make the comparison, or only its report, and return 1 if a run failed."""
    from report import write_report

    if options.report is not None:
        print(write_report(options.report))
        return 0
    plan = parse_plan(options)
    experiment = Experiment(
        config=options.config,
        overrides=options.overrides,
        presets=options.presets,
        has_warm_starts=options.warm_starts,
        ranks=options.ranks,
        launcher=launcher,
    )
    failed = compare(experiment, plan, options.out, jobs=options.jobs)
    print(write_report(options.out))
    return 1 if failed else 0


if __name__ == "__main__":
    # A batch system sends SIGTERM to this program. Treat it like Ctrl-C, so that the program also ends its runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
