"""Start small real runs with faults in them, and report how they ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from preloaded import VARIABLE
from taught import taught_folder
from tiny_models import CAPITALS

from a2tgpo.run.equality import NOT_COMPARED

ROOT = Path(__file__).resolve().parents[2]

INJECTED = Path(__file__).with_name("injected.py")
RANKS = 2


@dataclass
class Ended:
    """The result of one launch of a run."""

    code: int
    seconds: float
    output: str
    fault_s: float | None
    """Seconds from the last fault to the end. None if there was no fault."""
    lines: list[str] = field(default_factory=list)
    """Lines in which the program and its launcher report the end: `error:`, `launch:`, `stopped`, `warning:`."""


def write_inputs(root: Path) -> Path:
    """Write the configuration of all runs, a model that searches, questions and passages."""
    shutil.copytree(taught_folder(), root / "model", dirs_exist_ok=True)
    questions = [{"question": f"capital of {land}?", "answers": [city]} for land, city in CAPITALS.items()]
    questions += [
        {"question": f"ruler of {land}?", "answers": [f"King of {city}"]}
        for land, city in list(CAPITALS.items())[:3]
    ]
    questions += [
        {"question": "babble?", "answers": ["nothing"]},
        {"question": "loop?", "answers": ["nothing"]},
    ]
    passages = [
        {"id": land, "contents": f'"capital of {land}"\n{land} has {city}.'}
        for land, city in CAPITALS.items()
    ]
    for name, records in (("questions", questions), ("corpus", passages)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "run": {"name": "run", "root": str(root), "steps": 3, "log_rollouts": 0},
        "model": {"path": str(root / "model"), "dtype": "float32"},
        "data": {
            "train": str(root / "questions.jsonl"),
            "test": str(root / "questions.jsonl"),
            "instructions": "",
            "max_prompt_tokens": 64,
        },
        "search": {"corpus": str(root / "corpus.jsonl"), "top_k": 1},
        "tools": {"max_part_tokens": 16},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 2,
            "max_turns": 3,
            "max_turn_tokens": 48,
            "max_response_tokens": 160,
            "max_concurrent": 16,
            "kv_cache_gib": 0.05,
        },
        "update": {"prompts_per_minibatch": 2, "max_microbatch_tokens": 2048, "lr": 1.0e-4},
        "evaluation": {"every": 2, "max_questions": 4, "at_start": False},
        "checkpoint": {"every": 2, "keep": 2},
        "parallel": {"timeout_s": 120.0},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(
    config: Path,
    *overrides: str,
    faults: list[dict[str, Any]] = (),  # type: ignore[assignment]
    environment: dict[str, str] | None = None,
    timeout_s: float = 300,
) -> Ended:
    """Run the program on RANKS processes under its launcher until it ends, as a user would."""
    marks = config.with_name(f"{config.stem}.faults")
    marks.unlink(missing_ok=True)
    variables = os.environ | {
        "PYTHON": os.environ.get(VARIABLE, sys.executable),
        "OMP_NUM_THREADS": "1",
        "FAULTS": json.dumps(list(faults)),
        "FAULT_FILE": str(marks),
        **(environment or {}),
    }
    begin = time.monotonic()
    code, output = _run([str(config), *overrides], variables, timeout_s)
    end = time.monotonic()
    fault_s = end - float(marks.read_text().split()[-1]) if marks.exists() else None
    said = ("error:", "launch:", "stopped ", "warning:")
    lines = [line for line in output.splitlines() if line.startswith(said)]
    return Ended(code, end - begin, output, fault_s, lines)


def _run(arguments: list[str], variables: dict[str, str], timeout_s: float) -> tuple[int, str]:
    command = ["launch/local.sh", "-n", str(RANKS), "--script", str(INJECTED), *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, text=True, errors="replace", **pipes)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its ranks
        output, _ = process.communicate()
        output += f"\nharness: it did not end within {timeout_s:g} s"
    return process.returncode, output


def metrics_of(run: Path) -> dict[int, dict[str, Any]]:
    """Return the comparable metrics of each step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        record["step"]: {k: v for k, v in record.items() if not k.startswith(NOT_COMPARED)}
        for record in records
    }


def rollouts_of(run: Path) -> dict[str, bytes]:
    """Return the recorded rollouts of each step, by file."""
    folder = run / "rollouts"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*"))}


@dataclass(frozen=True)
class Row:
    """One line of the fault table."""

    fault: str
    point: str
    passed: bool
    outcome: str
    """What happened, in a few words, or why the row failed."""
    end_s: float | None = None
    """Seconds from the fault to the end of all processes, if the fault ended them."""
