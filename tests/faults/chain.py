"""Compare a run that is ended by one fault after another with a run without faults.

Each fault ends one start. The next start resumes the run, and is ended by another fault at a later step.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from faults.harness import Ended, Row, metrics_of, rollouts_of, start

PROMPT_S = 20.0
"""Longest time from a fault to the end of the whole job, seconds."""
KILLED, BROKEN, REQUEUED = 9, 3, 75


@dataclass(frozen=True)
class Fault:
    """The fault of one start."""

    action: str
    point: str
    rank: int
    code: int = KILLED
    """The expected exit code."""
    call: int = 1
    overrides: tuple[str, ...] = ()
    within_s: float = PROMPT_S

    @property
    def at_saves(self) -> bool:
        """Whether a run passes the point only in steps that save and evaluate."""
        return self.point.startswith(("save", "evaluation"))


EVERY_RANK = [
    ("refit", 1), ("rollout", 5), ("gain", 3), ("search", 1), ("before the bank", 1), ("after the bank", 1),
    ("exchange", 1), ("advantage", 1), ("score", 1), ("update", 1), ("update", 2), ("after the update", 1),
    ("record", 1), ("between steps", 1), ("evaluation", 1), ("save: copy", 1), ("save: write", 1),
    ("save: written", 1),
]  # fmt: skip
"""(point, number of the pass through this point at which the fault happens)."""
RANK_0 = [
    ("after the record", 1), ("save: before the rename", 1), ("save: after the rename", 1),
    ("save: before old ones go", 1),
]  # fmt: skip
WATCHED = ("watchdog.other_s=12", "watchdog.rollout_s=12")
"""No stage of these runs takes longer, even on a busy machine."""
HANG_S = 30.0
"""Longest time from a hang to the end, seconds: the deadline, the stacks of all ranks, and the launcher."""


def kills(rank: int) -> list[Fault]:
    points = EVERY_RANK + (RANK_0 if rank == 0 else [])
    return [Fault("kill", point, rank, call=call) for point, call in points]


def hangs() -> list[Fault]:
    return [
        Fault("fail", "rollout", 1, BROKEN, call=3),
        Fault("fail", "exchange", 0, BROKEN),
        Fault("hang", "rollout", 1, BROKEN, overrides=WATCHED, within_s=HANG_S),
        Fault("hold", "exchange", 1, BROKEN, overrides=WATCHED, within_s=HANG_S + 10),
        # The launcher gives the stopped process half a minute to answer SIGTERM.
        Fault("stop", "score", 1, BROKEN, overrides=("watchdog.score_s=12", *WATCHED), within_s=80),
    ]


def signals(action: str) -> list[Fault]:
    """Return faults that send a signal at every point, to both ranks in turn. The run saves and requests another
    start.
    """
    return [Fault(action, point, i % 2, REQUEUED, call=call) for i, (point, call) in enumerate(EVERY_RANK)]


def steps_needed(faults: list[Fault]) -> int:
    """Return the number of steps of a run that has a separate step for each of `faults`."""
    step = 0
    for fault in faults:
        step = next_step(step, fault)
    return step + 2


def next_step(step: int, fault: Fault) -> int:
    step += 1
    return step + 1 if fault.at_saves and step % 2 else step


def run_chain(
    config: Path, name: str, faults: list[Fault], undisturbed: Path, *, steps: int, damage: bool = False
) -> list[Row]:
    """Start the run `name` once for each of `faults`, and once more until it is finished.

    Args:
        undisturbed: folder of the same run without faults, with at least as many steps.
        steps: number of steps of the run.
        damage: whether to change a bit of the newest checkpoint before the last start.
    """
    expected, rows, step, run = metrics_of(undisturbed), [], 0, config.parent / name
    own = config.with_name(f"{name}.yaml")
    own.write_text(config.read_text())
    common = (f"run.name={name}", f"run.steps={steps}")
    for fault in faults:
        step = next_step(step, fault)
        injected = {
            "point": fault.point,
            "action": fault.action,
            "step": step,
            "rank": fault.rank,
            "call": fault.call,
        }
        ended = start(own, *common, *fault.overrides, faults=[injected])
        problem = judge_end(ended, fault)
        rows.append((fault, step, ended, problem))
    damaged = damage_newest(run) if damage else ""
    last = start(own, *common)
    problems = [] if last.code == 0 else [f"the last start ended with {last.code}: {last.output[-500:]}"]
    if damage and "skipping" not in last.output:
        problems.append("the damaged checkpoint was not noticed")
    if not problems:
        problems = differences(metrics_of(run), expected, steps)
        theirs = rollouts_of(undisturbed)
        problems += [
            f"{name} differs" for name, content in rollouts_of(run).items() if content != theirs[name]
        ]
    table = [
        to_row(fault, step, ended, problem or wrong_after(problems, step))
        for fault, step, ended, problem in rows
    ]
    if damage:
        table.append(
            Row(
                "a bit of the newest checkpoint changed",
                f"{damaged} (at start)",
                not problems,
                "; ".join(problems)[:300]
                or "skipped with a warning, resumed from the one before, equal metrics",
            )
        )
    return table


def judge_end(ended: Ended, fault: Fault) -> str:
    """Return what is wrong with the end of a start, or "" if nothing is wrong."""
    if ended.fault_s is None:
        return f"the fault did not happen (exit code {ended.code}: {ended.output[-300:]})"
    if ended.code != fault.code:
        return f"exit code {ended.code} instead of {fault.code}: {ended.output[-500:]}"
    if ended.fault_s > fault.within_s:
        return f"it took {ended.fault_s:.0f} s to end"
    said = [line for line in ended.lines if not line.startswith("warning:")]
    if len(said) != 1 or "Traceback" in ended.output:
        return f"{len(said)} messages instead of one: {ended.output[-500:]}"
    return ""


def to_row(fault: Fault, step: int, ended: Ended, problem: str) -> Row:
    names = {
        "kill": "SIGKILL", "term": "SIGTERM", "usr1": "SIGUSR1", "stop": "SIGSTOP", "fail": "exception",
        "hang": "hangs", "hold": "hangs in compiled code that holds the interpreter",
    }  # fmt: skip
    call = f", {fault.call}. time" if fault.call > 1 else ""
    outcome = problem or f"job ended with {ended.code} after {ended.fault_s:.1f} s, resumed, equal metrics"
    return Row(
        f"{names[fault.action]}, rank {fault.rank}",
        f"{fault.point}{call} (step {step})",
        not problem,
        outcome,
        ended.fault_s,
    )


def differences(found: dict, expected: dict, steps: int) -> list[str]:
    problems = [f"step {step} is missing" for step in range(1, steps + 1) if step not in found]
    for step, record in found.items():
        wanted = expected[step]
        # The shorter run evaluates and saves its last step, whatever the number of this step.
        keys = [k for k in wanted.keys() | record.keys() if record.get(k) != wanted.get(k)]
        if keys and not (step == steps and all(k.startswith("evaluation/") for k in keys)):
            problems.append(f"step {step} differs in {', '.join(sorted(keys)[:4])}")
    return problems


def wrong_after(problems: list[str], step: int) -> str:
    """Return the problems of `step` and of later steps, which a fault in `step` may have caused."""
    numbers = [(int((re.search(r"step.(\d+)", text) or [0, 10**9])[1]), text) for text in problems]
    return "; ".join(text for number, text in numbers if number >= step)[:300]


def damage_newest(run: Path) -> str:
    """Change a bit of a file of the newest checkpoint, and return the name of the file. The run's name seeds the
    choice.
    """
    draw = random.Random(run.name)
    whole = [path for path in (run / "checkpoints").glob("step_*") if not path.suffix]
    newest = max(whole, key=lambda path: int(path.name.split("_")[1]))
    path = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return str(path.relative_to(newest))
