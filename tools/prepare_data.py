"""Convert published question sets to question files, or generate the data sets of the examples.

    python tools/prepare_data.py worldqa --out FOLDER [--seed 0]
    python tools/prepare_data.py arithmetic --out FOLDER [--seed 0]
    python tools/prepare_data.py chains --out FOLDER [--seed 0]
    python tools/prepare_data.py SET --in RAW --out FILE [--against FILE] [--limit N]
    python tools/prepare_data.py jsonl --in RAW --out FILE --data-source NAME

`worldqa` writes questions of 1, 2 and 3 hops about countries and cities, a corpus that contains their answers, and
demonstrations of mixed quality for a warm start. `arithmetic` writes sums that the agent computes with the
calculator, and demonstrations. `chains` writes calculations of one to six steps, each of which is one call of the
calculator, and demonstrations of mixed quality. Equal seeds give equal files.

SET is one of hotpotqa, 2wiki, musique, bamboogle, nq, triviaqa, popqa and jsonl. RAW is the published file, which may
be compressed. For jsonl, RAW is a JSONL or Parquet file that has the fields `question` and `answers`, or the format
of verl's training sets for search agents. If RAW joins several sets, --data-source takes only the questions whose
field `data_source` is NAME. FILE can be used as data.train or data.test. FILE.report.json has counts, duplicates and
lengths. With --against, the report also has the number of questions that both files share.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence

from a2tgpo.config.expand import path_argument
from a2tgpo.data.question_formats import NO_ANSWER, READERS, read_items
from a2tgpo.data.question_set import Question, load_questions, unique_ids
from a2tgpo.evaluate.question_report import describe_questions
from a2tgpo.io.atomic_file import write_json
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.json_lines import write_lines
from a2tgpo.io.program import exit_code, program_parser

from worlds.arithmetic import build_arithmetic
from worlds.chains import build_chains
from worlds.worldqa import GOOD_SHARE, build_worldqa


def build_questions(args: argparse.Namespace) -> dict:
    """Write the questions of one published set to `args.out`, and a report to a second file. Return the report.

    Raises:
        ConfigError: with a one-line message, if the source cannot be read, or if no question has an answer.
    """
    others = load_questions(str(args.against), key="--against") if args.against else None
    questions: list[Question] = []
    sources: list[str] = []
    left_out: Counter[str] = Counter()
    others_of_file: Counter[str] = Counter()
    for number, item in enumerate(read_items(args.set, args.source, aliases=args.aliases)):
        if args.limit and len(questions) == args.limit:
            break
        if args.data_source and item.source != args.data_source:
            others_of_file[item.source] += 1
            continue
        reason = item.left_out or ("" if item.answers else NO_ANSWER)
        if reason:
            left_out[reason] += 1
            continue
        question = Question(
            id=item.id or f"{args.set}-{number}",
            question=" ".join(item.question.split()),
            answers=tuple(dict.fromkeys(item.answers)),
            hops=item.hops,
        )
        if not question.question:
            raise ConfigError(f"{item.where}: the question is empty")
        questions.append(question)
        sources.append(item.source)
    if others_of_file and not questions and not left_out:
        names = " | ".join(name or "questions without data_source" for name in others_of_file)
        raise ConfigError(f"--data-source is {args.data_source!r}; {args.source} has: {names}")
    if not questions:
        found = ", ".join(f"{count} x {reason}" for reason, count in left_out.items()) or "no item"
        raise ConfigError(
            f"--in: {args.source} has no question with an answer ({found}); is it the right split?"
        )
    ids = unique_ids([question.id for question in questions], sources)
    repeated = sum(question.id != identity for question, identity in zip(questions, ids, strict=True))
    questions = [dataclasses.replace(question, id=id) for question, id in zip(questions, ids, strict=True)]
    report = describe_questions(questions, left_out, others) | {"ids_made_unique": repeated}
    write_lines(args.out, (to_record(question) for question in questions))
    path = args.out.with_name(args.out.name + ".report.json")
    write_json(path, report)
    return report


def to_record(question: Question) -> dict:
    record = {"id": question.id, "question": question.question, "answers": list(question.answers)}
    return {**record, "hops": question.hops} if question.hops else record


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = program_parser(__doc__)
    sets = parser.add_subparsers(dest="set", required=True)
    add_worldqa(sets.add_parser("worldqa", help="countries and cities, from PyPI packages"))
    add_calculations(sets.add_parser("arithmetic", help="sums for the calculator"), 2000, 200, 3000)
    add_calculations(
        sets.add_parser("chains", help="calculations of several steps for the calculator"), 6000, 600, 16000
    )
    for name in READERS:
        published = sets.add_parser(
            name, help="question set as published" if name != "jsonl" else "any JSONL"
        )
        published.add_argument("--in", dest="source", type=path_argument, required=True, metavar="RAW")
        published.add_argument("--out", type=path_argument, required=True, metavar="FILE")
        published.add_argument(
            "--against", type=path_argument, metavar="FILE", help="prepared set to report the overlap with"
        )
        published.add_argument("--limit", type=int, default=0, help="only the first N questions; 0: all")
        published.add_argument(
            "--data-source", default="", metavar="NAME", help="jsonl: only the questions of this data_source"
        )
        published.add_argument(
            "--aliases", type=path_argument, help="2wiki: id_aliases.json, for other names of the answers"
        )
    args = parser.parse_args(argv)
    if args.set == "worldqa":
        check_worldqa(args)
    if args.set not in READERS:
        require(not args.out.is_file(), "--out", str(args.out), "a folder")
    for name in ("train_questions", "test_questions", "demonstrations"):
        if hasattr(args, name):
            option = f"--{name.replace('_', '-')}"
            require(getattr(args, name) >= 3, option, getattr(args, name), ">= 3")
    if args.set in READERS:
        require(not args.out.is_dir(), "--out", str(args.out), "a file, not a folder")
        require(args.limit >= 0, "--limit", args.limit, ">= 0")
        require(
            args.set == "jsonl" or not args.data_source, "--data-source", args.data_source, "with jsonl only"
        )
    return args


def add_calculations(
    world: argparse.ArgumentParser, train_questions: int, test_questions: int, demonstrations: int
) -> None:
    world.add_argument("--out", type=path_argument, required=True, help="folder that receives the files")
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--train-questions", type=int, default=train_questions)
    world.add_argument("--test-questions", type=int, default=test_questions)
    world.add_argument("--demonstrations", type=int, default=demonstrations)


def add_worldqa(worldqa: argparse.ArgumentParser) -> None:
    worldqa.add_argument("--out", type=path_argument, required=True, help="folder that receives the files")
    worldqa.add_argument(
        "--seed", type=int, default=0, help="seeds the split, the choice and the demonstrations"
    )
    worldqa.add_argument(
        "--top-k", type=int, default=1, help="passages in a demonstrated result (search.top_k)"
    )
    worldqa.add_argument(
        "--train-questions", type=int, default=6000, help="at most; a third per number of hops"
    )
    worldqa.add_argument(
        "--test-questions", type=int, default=600, help="at most; a third per number of hops"
    )
    worldqa.add_argument("--demonstrations", type=int, default=12000, help="a third per number of hops")
    worldqa.add_argument(
        "--good-share", type=float, nargs=3, default=GOOD_SHARE, metavar="SHARE",
        help="share of good demonstrations with 1, 2 and 3 hops (demonstrations_good.jsonl holds good ones only)",
    )  # fmt: skip
    worldqa.add_argument(
        "--detour-share", type=float, default=0.0,
        help="chance of a useless search before every search of demonstrations.jsonl",
    )  # fmt: skip


def check_worldqa(args: argparse.Namespace) -> None:
    require(args.top_k >= 1, "--top-k", args.top_k, ">= 1")
    require(0 <= args.detour_share < 1, "--detour-share", args.detour_share, "in [0, 1)")
    require(
        all(0 <= share <= 1 for share in args.good_share), "--good-share", args.good_share, "each in [0, 1]"
    )


def prepare(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`. Raise a one-line ConfigError if the command cannot be carried out."""
    args = parse_args(argv)
    builders = {"worldqa": build_worldqa, "arithmetic": build_arithmetic, "chains": build_chains}
    report = builders.get(args.set, build_questions)(args)
    print(json.dumps(report, indent=2, ensure_ascii=False))
    print(f"wrote {args.out}")


def main() -> int:
    return exit_code(prepare)


if __name__ == "__main__":
    sys.exit(main())
