"""Score a trained policy on question sets: greedy and pass@k, exact match and F1, with and without the format gate.

    python tools/evaluate.py --config CONFIG --checkpoint PATH [--sets NAME=FILE,FILE] [--samples N] [OVERRIDE ...]
    launch/local.sh -n RANKS --script tools/evaluate.py CONFIG --checkpoint PATH [...]

PATH is a run's checkpoint (runs/NAME/checkpoints/step_N, or .../best) or a Hugging Face folder; CONFIG is the run's
configuration (runs/NAME/config.yaml will do), which says how to play. Writes report.md, report.json, answers.jsonl
and tensorboard/ to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from a2tgpo.atomic_file import atomic_folder, write_json, write_text
from a2tgpo.config.check import ConfigError, require
from a2tgpo.config.expand import expand, path_argument, text_argument
from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.question_set import Question, load_questions
from launch.failure import exit_code
from launch.preflight import meet_ranks
from launch.rendezvous import join_launcher
from tools.json_lines_file import write_lines

if TYPE_CHECKING:
    from a2tgpo.data.template import PromptSet
    from a2tgpo.evaluate.evaluate import Answer
    from a2tgpo.player import Player
    from a2tgpo.saved_model import SavedModel

Answers = dict[str, list["Answer"]]
"""By data set."""


def main() -> int:
    args = parse_arguments()
    try:
        join_launcher()
        config = load_config(args.config, args.overrides)
        require(args.samples >= 0, "--samples", args.samples, ">= 0")
        require(args.limit >= 0, "--limit", args.limit, ">= 0")
        sets = load_sets(args.sets, config, limit=args.limit)
        evaluate_sets(config, sets, args)
    except (ConfigError, RuntimeError, OSError) as error:
        return exit_code(error)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--checkpoint",
        type=text_argument,
        required=True,
        metavar="PATH",
        help="run's checkpoint or Hugging Face folder",
    )
    parser.add_argument(
        "--sets",
        default="",
        metavar="NAME=FILE,FILE",
        help="question files, named by their folder or file where no name is given; default: data.test",
    )
    parser.add_argument("--limit", type=int, default=0, help="only the first N questions of each set; 0: all")
    parser.add_argument(
        "--samples", type=int, default=0, help="answers drawn per question for pass@k, besides the greedy one"
    )
    parser.add_argument(
        "--out", type=path_argument, help="folder of the report; default: ROOT/NAME/evaluation/CHECKPOINT"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="section.field=value, or a YAML file"
    )
    return parser.parse_intermixed_args()


def load_sets(text: str, config: RunConfig, *, limit: int) -> dict[str, list[Question]]:
    """Questions by data set; ConfigError if a file is bad or two sets have one name."""
    sets: dict[str, list[Question]] = {}
    for part in text.split(",") if text else [config.data.test]:
        name, equals, file = part.strip().partition("=")
        if not equals:
            name, file = set_name(Path(name)), name
        require(bool(name and file), "--sets", part, "NAME=FILE or FILE, separated by commas")
        require(
            name not in sets, "--sets", part, f"a name other than {name!r}, which is taken; say NAME=FILE"
        )
        questions = load_questions(expand(file, "--sets"), key="--sets" if text else "data.test")
        sets[name] = questions[:limit] if limit else questions
    return sets


def set_name(file: Path) -> str:
    """hotpotqa for data/hotpotqa/test.jsonl, bamboogle for data/bamboogle.jsonl."""
    return file.parent.name if file.stem in ("test", "dev", "train") and file.parent.name else file.stem


def evaluate_sets(config: RunConfig, sets: dict[str, list[Question]], args: argparse.Namespace) -> None:
    """Join the other ranks, play every set, write the report; every rank calls this."""
    from a2tgpo.data.template import PromptSet
    from a2tgpo.parallel.initialize import shutdown
    from a2tgpo.player import open_player
    from a2tgpo.saved_model import find_model

    model = find_model(args.checkpoint, untrained=config.model.path)
    groups = meet_ranks(config)
    player = open_player(config, groups, model)
    limit = config.data.max_prompt_tokens
    prompts = {
        name: PromptSet(questions, player.template, max_prompt_tokens=limit)
        for name, questions in sets.items()
    }
    for prompt_set in prompts.values():
        prompt_set.check_lengths()
    total = sum(map(len, prompts.values()))
    greedy = play(player, prompts, num_samples=0, total=total)
    sampled: Answers = {}
    if args.samples:
        sampled = play(player, prompts, num_samples=args.samples, total=total)
    if groups.rank == 0:
        out = args.out or Path(config.run.root) / config.run.name / "evaluation" / model.label
        write_report(out, config, model, greedy, sampled)
    player.close()
    shutdown()


def play(player: Player, sets: dict[str, PromptSet], *, num_samples: int, total: int) -> Answers:
    """All ranks' answers, in the sets' order; every rank calls this, and rank 0 shows progress."""
    import torch.distributed as dist
    from tqdm import tqdm

    from a2tgpo.evaluate.evaluate import answer_questions
    from a2tgpo.parallel.collectives import all_gather_object

    world = dist.group.WORLD
    assert world is not None, "the processes are joined"
    replicas = player.replicas
    answers: Answers = {}
    label = f"{num_samples} samples each" if num_samples else "greedy"
    with tqdm(total=total * max(1, num_samples), desc=label, unit="answer", disable=world.rank() != 0) as bar:
        done_before = 0
        for name, prompt_set in sets.items():
            share = range(len(prompt_set))[replicas.index :: replicas.count]

            def show(done: int, _all: int, base: int = done_before) -> None:
                # Replicas hold equal shares: one's progress stands for all.
                bar.update(min(base + done * replicas.count, total * max(1, num_samples)) - bar.n)

            mine, _ = answer_questions(
                player.rollout,
                prompt_set.prompts(range(len(prompt_set)), share),
                num_samples=num_samples,
                seed=player.config.run.seed,
                progress=show,
            )
            parts = all_gather_object(mine if replicas.is_first else [], world)
            order = {question.id: index for index, question in enumerate(prompt_set.questions)}
            answers[name] = sorted(
                (answer for part in parts for answer in part),
                key=lambda answer: (order[answer.question_id], answer.sample_index),
            )
            done_before += len(prompt_set) * max(1, num_samples)
    return answers


def write_report(out: Path, config: RunConfig, model: SavedModel, greedy: Answers, sampled: Answers) -> None:
    """Replace the folder `out` by a new one, complete or not at all, and print the tables."""
    from torch.utils.tensorboard import SummaryWriter

    from a2tgpo.evaluate.report import summarize, to_markdown, to_scalars

    summary = summarize(greedy, sampled)
    notes = [f"weights: {model.path}", f"run: {config.run.name}"]
    if sampled:
        notes.append(f"samples drawn at temperature {config.rollout.temperature:g}")
    page = to_markdown(summary, title=f"Evaluation of {config.run.name}, {model.label}", notes=notes)
    record = {"checkpoint": str(model.path), "step": model.step, "run": config.run.name, **summary}
    try:
        with atomic_folder(out) as folder:
            write_text(folder / "report.md", page)
            write_json(folder / "report.json", record)
            write_lines(
                folder / "answers.jsonl", answer_lines(greedy, "greedy") + answer_lines(sampled, "sample")
            )
            with SummaryWriter(str(folder / "tensorboard")) as board:
                for name, value in to_scalars(summary).items():
                    board.add_scalar(f"evaluation/{name}", value, model.step)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out} ({error.strerror}); choose another folder") from None
    print(page)
    print(f"wrote {out}", flush=True)


def answer_lines(answers: Answers, kind: str) -> list[dict[str, Any]]:
    return [
        {"set": name, "kind": kind, **dataclasses.asdict(answer)}
        for name, members in answers.items()
        for answer in members
    ]


if __name__ == "__main__":
    sys.exit(main())
