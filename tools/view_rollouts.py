"""Read a run's rollouts in the terminal.

    python tools/view_rollouts.py RUN [--step N] [--prompt ID] [--limit 5] [--order index|reward|gain]

RUN is a run's folder (runs/NAME). Shown for every trajectory: reward, exact match, format, why it stopped, the
gold answer's probability given the prompt alone; and for every turn what the policy wrote, what the search
answered, its gain, advantage and clip scale.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from a2tgpo.config.check import ConfigError
from tools.terminal import Painter, indented, painter_for

_FILE_NAME = re.compile(r"step_(\d+)\.jsonl\.zst")


def render_trajectory(record: dict, paint: Painter, *, with_prompt: bool) -> str:
    """One trajectory (a line of rollouts/step_N.jsonl.zst) as text."""
    reward = record["outcome_reward"]
    head = [
        f"{record['prompt_id']} #{record['sample_index']}",
        *([f"{record['hops']} hops"] if record["hops"] else []),
        paint(f"reward {reward:+.2f}", "green" if reward > 0 else "red"),
        f"EM {record['exact_match']:.0f}",
        "format ok" if record["format_ok"] else paint("format broken", "red"),
        f"stopped: {record['stop_reason']}",
    ]
    if record["baseline_prob"] is not None:
        head.append(f"P(gold) {record['baseline_prob']:.4f}")
    lines = [paint("─" * 100, "dim"), paint("  ".join(head), "bold")]
    if with_prompt:
        lines.append(paint(indented(record["prompt_text"]), "dim"))
    for number, turn in enumerate(record["turns"], start=1):
        lines += _render_turn(number, turn, paint)
    return "\n".join(lines)


def _render_turn(number: int, turn: dict, paint: Painter) -> list[str]:
    facts = [f"turn {number}: {len(turn['tokens'])} tokens"]
    if turn["query"] is not None:
        facts.append(f"query {turn['query']!r}, {len(turn['observation_tokens'])} tokens back")
    if turn["tool_failed"]:
        facts.append(paint("failed", "red"))
    if turn["info_gain"] is not None:
        gain = turn["info_gain"]
        shown = f"gain {gain:+.4f}" + (
            "" if turn["answer_prob"] is None else f" to P {turn['answer_prob']:.4f}"
        )
        facts.append(paint(shown, "green" if gain > 0 else "red" if gain < 0 else "yellow"))
    facts.append(f"advantage {turn['advantage']:+.3f}, clip scale {turn['clip_scale']:.3f}")
    lines = [paint("  ".join(facts), "yellow")]
    lines.append(paint.tags(indented(turn["text"])))
    if turn["observation_text"]:
        lines.append(paint(indented(turn["observation_text"]), "dim"))
    return lines


def read_records(path: Path) -> list[dict]:
    """The trajectories in one file, in order; ConfigError (one line) if it cannot be read or is damaged."""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        lines = decompressor.decompress(path.read_bytes()).decode("utf-8").split("\n")
        complete = decompressor.eof  # a file cut short raises nothing
        records = [json.loads(line) for line in lines if line] if complete else []
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror})") from None
    except (zstandard.ZstdError, ValueError):
        complete = False
    if not complete:
        raise ConfigError(f"{path} is damaged; give another --step")
    return records


def select(run_dir: Path, *, step: int | None, prompt: str | None, order: str) -> tuple[int, list[dict]]:
    """(step, its trajectories in order); the newest step unless one is named. ConfigError if there are none."""
    folder = run_dir / "rollouts"
    names = {path: _FILE_NAME.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ())}
    files = {int(match.group(1)): path for path, match in names.items() if match}
    if not files:
        raise ConfigError(f"{run_dir} has no rollouts; give the folder of a run, like runs/quickstart")
    if step is None:
        step = max(files)
    if step not in files:
        raise ConfigError(f"{run_dir} has no rollouts of step {step}; there are {min(files)} to {max(files)}")
    records = [record for record in read_records(files[step]) if prompt in (None, record["prompt_id"])]
    if not records:
        asked = f" of prompt {prompt!r}" if prompt is not None else ""
        raise ConfigError(f"step {step} of {run_dir} has no rollouts{asked}")
    return step, sorted(records, key=ORDERS[order])


def _index(record: dict) -> tuple:
    return record["prompt_index"], record["sample_index"]


ORDERS: dict[str, Callable[[dict], tuple]] = {
    "index": _index,
    "reward": lambda record: (-record["outcome_reward"], *_index(record)),
    "gain": lambda record: (-sum(turn["info_gain"] or 0.0 for turn in record["turns"]), *_index(record)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Read a run's rollouts in the terminal.")
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/quickstart")
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--prompt", help="only rollouts of the question with this id")
    parser.add_argument("--limit", type=int, default=5, help="trajectories shown; 0: all")
    parser.add_argument(
        "--order", choices=sorted(ORDERS), default="index", help="reward and gain: highest first"
    )
    options = parser.parse_args()
    try:
        step, records = select(options.run, step=options.step, prompt=options.prompt, order=options.order)
    except ConfigError as error:
        print(f"view_rollouts: {error}", file=sys.stderr)
        return 2
    paint = painter_for(sys.stdout)
    shown = records[: options.limit] if options.limit > 0 else records
    try:
        shown_prompt = None
        for record in shown:
            print(render_trajectory(record, paint, with_prompt=record["prompt_id"] != shown_prompt))
            shown_prompt = record["prompt_id"]
        print(paint(f"step {step}: {len(shown)} of {len(records)} trajectories shown", "dim"), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain when it closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
