"""Select good trajectories of a run, and write them as demonstrations for a warm start (rejection sampling).

    python tools/rollouts_to_demonstrations.py RUN --out FILE [--steps FIRST-LAST] [--per-question 2]
        [--min-reward R] [--any-answer] [--any-format] [--max-failed-calls 0] [--max-tokens N] [--questions FILE]

RUN is a run's folder (runs/NAME). By default, a trajectory is accepted if its answer matches a gold answer exactly,
its format is right, and no tool call failed. For each question, the best N trajectories are kept (--per-question N).
The best trajectories have the highest reward, then the fewest calls, then the fewest tokens. FILE can be used as
`warmstart.demonstrations` (docs/warmstart.md).
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import yaml

from a2tgpo.config.expand import expand, in_all_texts, path_argument
from a2tgpo.data.question_mix import load_question_mix
from a2tgpo.io.atomic_file import write_text
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.program import exit_code
from a2tgpo.record.rollout_files import step_ranges
from a2tgpo.warmstart.rejection import Filters, demonstrations_of, step_files


def main() -> int:
    args = parse_arguments()
    return exit_code(lambda: write_demonstrations(args))


def write_demonstrations(args: argparse.Namespace) -> None:
    """Write the selected trajectories to `args.out`. Print how many trajectories were left out for each reason."""
    require(args.per_question >= 1, "--per-question", args.per_question, ">= 1")
    first, last = steps_of(args.steps)
    records, counts, num_read = demonstrations_of(
        args.run,
        load_question_mix(
            {str(args.questions): 1.0} if args.questions else training_files(args.run), key="--questions"
        ).questions,
        Filters(
            min_reward=args.min_reward,
            needs_exact_match=not args.any_answer,
            needs_format=not args.any_format,
            max_failed_calls=args.max_failed_calls,
            max_tokens=args.max_tokens,
        ),
        per_question=args.per_question,
        first=first,
        last=last,
    )
    steps = step_files(args.run, first=first, last=last)
    print(f"{num_read} rollouts read, of steps {step_ranges(steps)}")
    for reason, count in counts.most_common():
        print(f"  {count:>8} left out: {reason}")
    num_questions = len({record["id"] for record in records})
    print(f"  {len(records):>8} taken, of {num_questions} questions")
    if not records:
        raise ConfigError("no rollout is good enough; loosen the filters, or include more steps")
    write_text(args.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    print(f"wrote {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=path_argument, required=True, help="JSONL of demonstrations")
    parser.add_argument(
        "--steps", default="", metavar="FIRST-LAST", help="steps to read, as 10-20 or 10-; all"
    )
    parser.add_argument("--per-question", type=int, default=2, metavar="K", help="maximum per question (2)")
    parser.add_argument("--min-reward", type=float, metavar="R", help="minimum outcome reward; default: any")
    parser.add_argument("--any-answer", action="store_true", help="accept answers that do not match exactly")
    parser.add_argument("--any-format", action="store_true", help="accept responses with a broken format")
    parser.add_argument(
        "--max-failed-calls",
        type=int,
        default=0,
        metavar="N",
        help="maximum number of calls without an answer (0)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=0,
        metavar="N",
        help="longest response, in tokens that the policy sampled; 0: any",
    )
    parser.add_argument(
        "--questions", type=path_argument, help="the run's training questions, if its data.train has moved"
    )
    return parser.parse_args()


def steps_of(text: str) -> tuple[int, int | None]:
    """Return the first and the last step of --steps. The last is None if there is no upper limit."""
    if not text:
        return 0, None
    match = re.fullmatch(r"(\d+)(-(\d*))?", text)
    if match is None:
        raise ConfigError(f"--steps is {text!r}; allowed: a step, FIRST-LAST, or FIRST-")
    first = int(match[1])
    if match[2] is None:
        return first, first
    return first, int(match[3]) if match[3] else None


def training_files(run: Path) -> dict[str, float]:
    """Return the training files of the run's configuration, with their weights."""
    path = run / "config.yaml"
    try:
        train = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["train"]
        expanded = in_all_texts(train, functools.partial(expand, key=f"{path}: data.train"))
        return dict(expanded) if isinstance(expanded, dict) else {str(expanded): 1.0}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a run's folder") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not a run's configuration; give --questions") from None


if __name__ == "__main__":
    sys.exit(main())
