"""Make the data sets that the examples train on.

    python tools/prepare_data.py worldqa --out artifacts/worldqa [--seed 0]

worldqa: questions of 1, 2 and 3 hops about countries and cities, with the corpus that answers them and
demonstrations of mixed quality for a warm start. Writes corpus.jsonl, train.jsonl, test.jsonl,
demonstrations.jsonl, demonstrations_good.jsonl and report.json. Equal seeds give equal files.
"""

import argparse
import functools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from a2tgpo.config.check import ConfigError, require
from a2tgpo.rollout.tool_call import format_observation, format_passage
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.passage import Passage
from tools.worldqa_demonstrations import build_demonstrations, spread
from tools.worldqa_facts import load_world
from tools.worldqa_questions import Hop, Question, build_corpus, build_questions, split_countries

GOOD_SHARE = (0.6, 0.26, 0.2)
"""Share of good demonstrations with 1, 2 and 3 hops: so few that the most probable course is often a bad habit."""


def build_worldqa(args: argparse.Namespace) -> dict:
    """Write the data set to `args.out`; returns the report."""
    world = load_world()
    corpus = build_corpus(world)
    index = Bm25Index(corpus)

    @functools.cache
    def search(query: str) -> tuple[Passage, ...]:
        return tuple(passage for passage, _ in index.search(query, args.top_k))

    def observe(query: str) -> str:
        return format_observation([format_passage(rank, p) for rank, p in enumerate(search(query), start=1)])

    def answerable(hop: Hop) -> bool:
        """Its passage is the first hit, so that every top_k shows it."""
        return search(hop.query)[0].id == hop.passage_id

    splits = {}
    for name, codes in zip(("train", "test"), split_countries(world, args.seed), strict=True):
        draw = random.Random(f"{name}-{args.seed}")
        questions = build_questions(world, codes, answerable)
        count = args.train_questions if name == "train" else args.test_questions
        splits[name] = {hops: unique(spread(pool, count // 3, draw)) for hops, pool in questions.items()}
    train, test = (interleave(splits[name], args.seed) for name in ("train", "test"))
    make = functools.partial(
        build_demonstrations,
        splits["train"],
        num_demonstrations=args.demonstrations,
        search=observe,
        seed=args.seed,
    )
    mixed, good = (
        make(good_share=dict(zip((1, 2, 3), share, strict=True)), detour_share=detours)
        for share, detours in ((args.good_share, args.detour_share), ((1.0, 1.0, 1.0), 0.0))
    )

    write_lines(args.out / "corpus.jsonl", ({"id": p.id, "contents": p.contents} for p in corpus))
    write_lines(args.out / "train.jsonl", (question.to_dict() for question in train))
    write_lines(args.out / "test.jsonl", (question.to_dict() for question in test))
    write_lines(args.out / "demonstrations.jsonl", mixed)
    write_lines(args.out / "demonstrations_good.jsonl", good)
    report = describe(corpus, train, test, mixed)
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def unique(questions: Iterable[Question]) -> list[Question]:
    return list({question.id: question for question in questions}.values())


def interleave(questions: dict[int, list[Question]], seed: int) -> list[Question]:
    """All questions, mixed so that the first N hold every number of hops about equally."""
    placed = []
    for hops, pool in sorted(questions.items()):
        order = random.Random(f"order-{hops}-{seed}").sample(pool, len(pool))
        placed += [((i + 0.5) / len(order), hops, question) for i, question in enumerate(order)]
    return [question for _, _, question in sorted(placed, key=lambda entry: entry[:2])]


def describe(
    corpus: Sequence[Passage],
    train: Sequence[Question],
    test: Sequence[Question],
    demonstrations: Sequence[dict],
) -> dict:
    """Counts that show whether the data set is as meant."""
    subjects = {
        name: {code for question in questions for code in question.entities}
        for name, questions in (("train", train), ("test", test))
    }
    texts = [question.text for question in [*train, *test]]
    words = [len(passage.text.split()) for passage in corpus]
    return {
        "passages": len(corpus),
        "passage_words": {"mean": round(sum(words) / len(words), 1), "max": max(words)},
        "repeated_passages": len(corpus) - len({passage.contents for passage in corpus}),
        "questions": {
            name: {hops: sum(len(q.hops) == hops for q in questions) for hops in (1, 2, 3)}
            for name, questions in (("train", train), ("test", test))
        },
        "repeated_questions": len(texts) - len(set(texts)),
        "countries": {name: len(codes) for name, codes in subjects.items()},
        "countries_in_both": len(subjects["train"] & subjects["test"]),
        "demonstrations": dict(Counter(record["quality"] for record in demonstrations).most_common()),
        "demonstration_turns": dict(
            sorted(Counter(len(record["turns"]) for record in demonstrations).items())
        ),
    }


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write JSONL, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as handle:
        for record in records:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = parser.add_subparsers(dest="set", required=True)
    worldqa = sets.add_parser("worldqa", help="countries and cities, from PyPI packages")
    worldqa.add_argument("--out", type=Path, required=True, help="folder that receives the files")
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
    args = parser.parse_args(argv)
    require(0 <= args.detour_share < 1, "--detour-share", args.detour_share, "in [0, 1)")
    require(
        all(0 <= share <= 1 for share in args.good_share), "--good-share", args.good_share, "each in [0, 1]"
    )
    for name in ("top_k", "train_questions", "test_questions", "demonstrations"):
        smallest = 1 if name == "top_k" else 3
        require(
            getattr(args, name) >= smallest,
            f"--{name.replace('_', '-')}",
            getattr(args, name),
            f">= {smallest}",
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    report = build_worldqa(args)
    print(json.dumps(report, indent=2))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
