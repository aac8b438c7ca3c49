"""Measure a whole training step of SmolLM2-135M on worldqa, stage by stage, and compare it with TRL's GRPOTrainer.

The bench runs launch/train.py on two processes with configs/smollm2_cpu.yaml and two prompts per step. The run starts
from the model of its warm start. If this model is missing, the bench first makes it. The times of stages are the
run's own `time/*` metrics, without the first step. The rollout stage includes scoring for information gain.

After `make setup-trl`, TRL also trains on two processes with one thread each. TRL uses the same questions, group
size, lengths, search, observations and rewards, two updates per step, and two trajectories per forward pass. TRL
differs from this project as follows. TRL's rollouts use transformers' generate, because TRL's vLLM modes need a GPU
or a server. TRL's loss has one ratio per token. TRL pads rows. TRL's output layer, which is made for GPUs, runs at
every position. TRL scores no information gain, and has no refit. The two programs sample different text, so compare
tokens per second.

The bench takes about 9 minutes, and 4 more if it makes the warm start.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import measure
import trl_peer

from a2tgpo.config.load import load_config
from a2tgpo.metrics.writer import read_metrics

CONFIG, RANKS, STEPS = "configs/smollm2_cpu.yaml", 2, 3
ROUNDS = 2
"""Runs of each program. The programs run in turn, so that a change of the machine's speed affects both."""
OVERRIDES = [
    f"run.steps={STEPS}",
    "rollout.prompts_per_step=2",
    "update.prompts_per_minibatch=1",
    "evaluation.at_start=false",
    "evaluation.max_questions=1",
    "checkpoint.every=0",
]
STAGES = ("refit", "rollout", "score", "update", "other")


def command(*arguments: str) -> None:
    """Run launch/local.sh with `arguments` on `RANKS` processes."""
    measure.run_program(
        f"launch/local.sh {' '.join(arguments)}",
        ["launch/local.sh", "-n", str(RANKS), *arguments],
        {"PYTHON": sys.executable},
    )


def ours() -> list[dict[str, float]]:
    """Run the training. For each step, return the wall seconds of each stage and of the `step`, and token counts."""
    with tempfile.TemporaryDirectory() as root:
        command(CONFIG, f"run.root={root}", *OVERRIDES)
        rollout = load_config(CONFIG, OVERRIDES).rollout
        num_trajectories = rollout.prompts_per_step * rollout.group_size
        steps = []
        for record in read_metrics(Path(root, "smollm2_cpu", "metrics.jsonl")):
            if "time/step_s" not in record:
                continue
            step = {stage: record[f"time/{stage}_s"] for stage in STAGES if stage != "other"}
            step["other"] = record["time/step_s"] - sum(step.values())
            step["step"] = record["time/step_s"]
            step["sampled_tokens"] = record["length/response_tokens"] * num_trajectories
            step["tokens"] = record["length/total_tokens"] * num_trajectories
            steps.append(step)
    return steps


def theirs() -> list[dict[str, float]]:
    """Run TRL's training. Return the same values as `ours`."""
    request = {"config": CONFIG, "overrides": OVERRIDES, "ranks": RANKS}
    return trl_peer.run("trl_whole_step.py", request, ranks=RANKS)["steps"]


def rows() -> list[measure.Row]:
    if not Path(measure.ROOT, load_config(CONFIG).model.path, "config.json").exists():
        print("warm start", flush=True)
        command("--script", "launch/warmstart.py", CONFIG)
    programs = {"ours": ours}
    if trl_peer.is_there():
        programs["TRL"] = theirs
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for number in range(ROUNDS):
        for name in list(programs)[:: -1 if number % 2 else 1]:
            found = programs[name]()[1:]
            print(f"  {name}: {found}", flush=True)
            steps[name] += found
    mine = steps["ours"]
    made = [
        measure.compared(
            f"step of SmolLM2-135M on worldqa: {stage}" + (", gain included" if stage == "rollout" else ""),
            [step[stage] for step in mine],
            [step["step"] for step in mine],
            baseline_is="the whole step",
            unit="s",
            ratio_is="ours / baseline",
        )
        for stage in STAGES
    ]
    if "TRL" not in steps:
        return made
    peer = steps["TRL"]
    shares = ", ".join(
        f"{stage} {sum(s[stage] for s in peer) / sum(s['step'] for s in peer):.0%}" for stage in STAGES[1:]
    )
    for name, words, took, target, note in (
        ("sampled_tokens", "sampled tokens over a whole step", ("step",), ">= 1.6", f"its step: {shares}"),
        (
            "tokens",
            "trained tokens over a whole step",
            ("step",),
            ">= 1.6",
            "prompts and observations included; it scores no gain",
        ),
        ("sampled_tokens", "sampled tokens over the rollout", ("rollout",), "", "ours with gain"),
        (
            "tokens",
            "trained tokens over score and update",
            ("score", "update"),
            ">= 1.4",
            "its output layer runs everywhere",
        ),
    ):
        made.append(
            measure.compared(
                f"SmolLM2-135M on worldqa: {words}",
                [step[name] / sum(step[stage] for stage in took) for step in mine],
                [step[name] / sum(step[stage] for stage in took) for step in peer],
                baseline_is=f"{trl_peer.NAME}, generating by transformers",
                unit="tokens/s",
                ratio_is="ours / baseline",
                target=target,
                note=note,
            )
        )
    return made
