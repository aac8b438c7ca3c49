"""The runs of a comparison, their files, and their results.

`DIR/ablation.json` has the methods, the seeds, the contrasts, and the exit codes of runs that have ended.
`DIR/runs/NAME-seedS/` is the folder of a run.
`DIR/logs/NAME-seedS.log` has the output of all attempts to train a run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.io.atomic_file import write_json
from a2tgpo.io.errors import ConfigError
from a2tgpo.metrics.writer import METRICS_FILE, read_metrics

PLAN_FILE = "ablation.json"
CONFIG_FILE = "config.yaml"
ATTEMPT_MARK = "$ "
"""Prefix of the log line that contains the command. Each attempt begins with such a line."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run of one method with one seed."""

    method: str
    seed: int
    out: Path
    """The comparison's folder, DIR."""

    @property
    def name(self) -> str:
        return f"{self.method}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"

    @property
    def config_file(self) -> Path:
        return self.folder / CONFIG_FILE

    @property
    def metrics_file(self) -> Path:
        return self.folder / METRICS_FILE

    def step(self) -> int:
        """Return the number of steps that the run has completed."""
        records = read_metrics(self.metrics_file)
        return records[-1]["step"] if records else 0


@dataclass(kw_only=True)
class Plan:
    """The methods and seeds of a comparison, stored in DIR/ablation.json."""

    methods: list[str]
    """Names of the methods. The first method is the base that the other methods are compared with."""
    seeds: list[int]
    contrasts: list[str] = field(default_factory=list)
    """Differences that the report tests, as METHOD-BASE."""
    exit_codes: dict[str, int] = field(default_factory=dict)
    """{name of the run: exit code of its last attempt}, for runs whose last attempt has ended."""

    def runs(self, out: Path) -> list[Run]:
        """Return the runs ordered by seed, so that an interrupted comparison has all methods for its first seeds."""
        return [Run(method=method, seed=seed, out=out) for seed in self.seeds for method in self.methods]

    def widen(self, earlier: Plan) -> None:
        """Add everything that only the earlier plan has. This plan's methods and contrasts come first."""
        self.methods += [method for method in earlier.methods if method not in self.methods]
        self.seeds = sorted({*self.seeds, *earlier.seeds})
        self.contrasts += [contrast for contrast in earlier.contrasts if contrast not in self.contrasts]
        self.exit_codes = earlier.exit_codes | self.exit_codes

    def save(self, out: Path) -> None:
        write_json(out / PLAN_FILE, asdict(self))


def load_plan(out: Path) -> Plan:
    """Load the plan of the comparison in `out`. Raise ConfigError if the plan is missing or damaged."""
    try:
        return Plan(**json.loads((out / PLAN_FILE).read_text(encoding="utf-8")))
    except OSError:
        raise ConfigError(f"{out} has no {PLAN_FILE}; give the --out folder of a comparison") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{out / PLAN_FILE} is damaged; start the comparison again to rewrite it") from None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run's recorded metrics, and whether the run is finished."""

    run: Run
    config: RunConfig | None
    """The resolved configuration of the run's last start, or None if the run never started."""
    records: Sequence[dict]
    """The records of metrics.jsonl, one per step."""
    status: str
    """`finished` if the last step and its evaluation are recorded, `failed` if the last attempt ended too early, else
    `unfinished`."""
    fault: str
    """A line that says why the run is not finished, or "" if it is finished."""

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    @property
    def steps(self) -> int:
        return self.records[-1]["step"] if self.records else 0

    def evaluations(self) -> list[dict]:
        """Return the records that have a held-out score, in the order of their steps."""
        return [record for record in self.records if record.get("evaluation/em") is not None]


def read_result(run: Run, exit_code: int | None) -> RunResult:
    """Read the results of `run` from its folder. `exit_code` is None if the last attempt has not ended."""
    config = load_config(run.config_file) if run.config_file.exists() else None
    records = read_metrics(run.metrics_file)
    status, fault = "finished", ""
    if not _is_complete(config, records):
        status = "unfinished" if exit_code is None else "failed"
        step = records[-1]["step"] if records else 0
        fault = "not started" if config is None else f"step {step} of {config.run.steps}"
        if exit_code is not None:
            fault += f", exit code {exit_code}: {last_words(run.log)}"
    return RunResult(run=run, config=config, records=records, status=status, fault=fault)


def read_results(out: Path) -> tuple[Plan, list[RunResult]]:
    """Return the plan of the comparison in `out`, and the results of its runs, ordered by method as in the plan."""
    plan = load_plan(out)
    results = [read_result(run, plan.exit_codes.get(run.name)) for run in plan.runs(out)]
    return plan, sorted(results, key=lambda result: plan.methods.index(result.run.method))


def _is_complete(config: RunConfig | None, records: Sequence[dict]) -> bool:
    if config is None or not records:
        return False
    return records[-1]["step"] == config.run.steps and records[-1].get("evaluation/em") is not None


def last_words(log: Path) -> str:
    """Return the last "error:" line of the last attempt's log, or the last line if no line begins with "error:"."""
    if not log.exists():
        return "no log"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith(ATTEMPT_MARK)]
    output = [line for line in lines[starts[-1] + 1 if starts else 0 :] if line]
    errors = [line for line in output if line.startswith("error:")]
    return (errors or output or ["no output"])[-1]
