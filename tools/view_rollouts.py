"""Show a run's recorded trajectories in the terminal, or write them as a page for the browser.

    python tools/view_rollouts.py RUN [--step N] [--prompt ID] [--limit 5] [--order index|reward|gain]
    python tools/view_rollouts.py RUN --html FILE [--step N] [--prompt ID]

RUN is a run's folder (runs/NAME). For every trajectory, the program shows reward, exact match, format, stop reason,
and the gold answer's probability given only the prompt. For every turn, it shows the policy's text, the observation,
gain, advantage, clip scale and, if the turn was trained on, its ratio. The page works without other files. In the
page you can select a step, a question, and right or wrong answers. Each token is coloured by its log-prob. Only the
page shows the branches inside turns (`rollout.inner_branches`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from a2tgpo.config.expand import path_argument
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.program import exit_code
from a2tgpo.io.terminal import Painter, end_with_reader, indented, painter_for
from a2tgpo.record.rollout_files import read_records, recorded_steps, step_ranges
from a2tgpo.record.rollouts_page import Decode, chosen_steps, with_branches, write_page

_SHOWN = {
    *("prompt_index", "prompt_id", "sample_index", "hops", "outcome_reward", "exact_match", "format_ok"),
    *("stop_reason", "baseline_prob", "prompt_text", "turns"),
}
_SHOWN_OF_TURN = {
    *("tokens", "rollout_logprobs", "query", "observation_tokens", "tool_failed", "info_gain", "answer_prob"),
    *("advantage", "clip_scale", "text", "observation_text"),
}


def render_trajectory(record: dict, paint: Painter, *, with_prompt: bool) -> str:
    """Return the text that shows one trajectory. `record` is one line of the recorded rollouts."""
    reward = record["outcome_reward"]
    head = [
        f"{record['prompt_id']} #{record['sample_index']}",
        *([f"{record['hops']} hops"] if record["hops"] else []),
        paint("no reward", "red")
        if record.get("reward_error")
        else paint(f"reward {reward:+.2f}", "green" if reward > 0 else "red"),
        *(f"{name} {value:.2f}" for name, value in (record.get("rewards") or {}).items() if name != "em"),
        f"EM {record['exact_match']:.0f}",
        "format ok" if record["format_ok"] else paint("format broken", "red"),
        f"stopped: {record['stop_reason']}",
    ]
    if (branch := record.get("branch")) is not None:
        place = f"after turn {len(branch['owners'])}" if branch["owners"] else "at the prompt"
        head.append(f"branch of #{branch['parent']} {place}")
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
        queries = [call["arguments"] for call in turn.get("calls", ())] or [turn["query"]]
        shown_queries = ", ".join(map(repr, queries))
        facts.append(f"query {shown_queries}, {len(turn['observation_tokens'])} tokens back")
    if turn["tool_failed"]:
        facts.append(paint("failed", "red"))
    if turn["info_gain"] is not None:
        gain = turn["info_gain"]
        shown = f"gain {gain:+.4f}" + (
            "" if turn["answer_prob"] is None else f" to P {turn['answer_prob']:.4f}"
        )
        facts.append(paint(shown, "green" if gain > 0 else "red" if gain < 0 else "yellow"))
    # Skip a value that was not finite, and a ratio that older versions did not record.
    weights = {"advantage": "+.3f", "clip_scale": ".3f", "ratio": ".5f"}
    shown_weights = [
        f"{name.replace('_', ' ')} {turn[name]:{digits}}"
        for name, digits in weights.items()
        if turn.get(name) is not None
    ]
    facts.append(", ".join(shown_weights) or "no advantage")
    lines = [paint("  ".join(facts), "yellow")]
    lines.append(paint.tags(indented(turn["text"])))
    if turn["observation_text"]:
        lines.append(paint(indented(turn["observation_text"]), "dim"))
    return lines


def _is_trajectory(record: object) -> bool:
    """Return whether `record` has every field that this tool shows."""
    if not isinstance(record, dict) or not record.keys() >= _SHOWN or not isinstance(record["turns"], list):
        return False
    return all(
        isinstance(turn, dict)
        and turn.keys() >= _SHOWN_OF_TURN
        and len(turn["tokens"]) == len(turn["rollout_logprobs"])
        for turn in record["turns"]
    )


def select(run_dir: Path, *, step: int | None, prompt: str | None, order: str) -> tuple[int, list[dict]]:
    """Return the number of a step and the step's trajectories.

    Args:
        step: None means the newest step with recorded trajectories.
        prompt: the id of the question whose trajectories are returned. None means all questions.
        order: a key of `ORDERS`.

    Raises:
        ConfigError: if no recorded trajectory fits the arguments, or if a file of the step is damaged.
    """
    files = rollout_files(run_dir)
    if step is None:
        step = max(files)
    if step not in files:
        raise ConfigError(f"{run_dir} has no rollouts of step {step}; recorded: {step_ranges(files)}")
    found = read_records(files[step])
    if not all(map(_is_trajectory, found)):
        raise ConfigError(f"{files[step][0]} is damaged; give another --step")
    records = [record for record in found if prompt in (None, record["prompt_id"])]
    if not records:
        filter_text = f" of prompt {prompt!r}" if prompt is not None else ""
        raise ConfigError(f"step {step} of {run_dir} has no rollouts{filter_text}")
    return step, sorted(records, key=ORDERS[order])


def rollout_files(run_dir: Path) -> dict[int, list[Path]]:
    """Return {step: its files of rollouts}, ordered by step. Raise ConfigError if the run has no rollouts."""
    files = recorded_steps(run_dir)
    if not files:
        raise ConfigError(f"{run_dir} has no rollouts; give the folder of a run, like runs/quickstart")
    return files


def page(run_dir: Path, out: Path, *, step: int | None, prompt: str | None) -> str:
    """Write the page to `out`, and return the line to print. If `step` is None, show as many steps as the page can
    hold."""
    if step is not None:
        steps = {step: select(run_dir, step=step, prompt=prompt, order="index")[1]}
    else:
        files = rollout_files(run_dir)
        _, newest = select(run_dir, step=max(files), prompt=None, order="index")
        chosen = chosen_steps(dict.fromkeys(files, len(with_branches(newest))))
        steps = {number: select(run_dir, step=number, prompt=prompt, order="index")[1] for number in chosen}
    write_page(out, run_dir.resolve().name, steps, decoder(run_dir))
    shown = ", ".join(str(number) for number in steps)
    return f"wrote {out}: steps {shown}; open it in a browser"


def decoder(run_dir: Path) -> Decode | None:
    """Return a function that decodes token ids, or None after a warning if the run's tokenizer cannot be loaded."""
    import yaml

    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        folder = Path(config["model"]["path"])
        if not (folder / "tokenizer.json").is_file():
            raise OSError(f"no tokenizer in {folder}")
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        print(f"view_rollouts: tokens are not coloured ({error})", file=sys.stderr)
        return None
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=False)


def _index(record: dict) -> tuple:
    return record["prompt_index"], record["sample_index"]


ORDERS: dict[str, Callable[[dict], tuple]] = {
    "index": _index,
    "reward": lambda record: (-record["outcome_reward"], *_index(record)),
    "gain": lambda record: (-sum(turn["info_gain"] or 0.0 for turn in record["turns"]), *_index(record)),
}


def view() -> None:
    """Read the command line, and print the chosen rollouts or write them as a page."""
    parser = argparse.ArgumentParser(description="Read a run's rollouts in the terminal, or as a page.")
    parser.add_argument("run", type=path_argument, help="folder of the run, e.g. runs/quickstart")
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--prompt", help="only rollouts of the question with this id")
    parser.add_argument("--limit", type=int, default=5, help="trajectories shown; 0: all")
    parser.add_argument(
        "--order", choices=sorted(ORDERS), default="index", help="reward and gain: highest first"
    )
    parser.add_argument(
        "--html", type=path_argument, metavar="FILE", help="write a page for the browser instead"
    )
    options = parser.parse_args()
    if options.html is not None:
        print(page(options.run, options.html, step=options.step, prompt=options.prompt))
        return
    step, records = select(options.run, step=options.step, prompt=options.prompt, order=options.order)
    paint = painter_for(sys.stdout)
    shown = records[: options.limit] if options.limit > 0 else records
    try:
        shown_prompt = None
        for record in shown:
            print(render_trajectory(record, paint, with_prompt=record["prompt_id"] != shown_prompt))
            shown_prompt = record["prompt_id"]
        print(paint(f"step {step}: {len(shown)} of {len(records)} trajectories shown", "dim"), flush=True)
    except BrokenPipeError:  # `| head` has ended; without this, Python would print an error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    end_with_reader()
    sys.exit(exit_code(view, out="--html"))
