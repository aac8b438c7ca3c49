"""Build the worldqa data set: a corpus about countries and cities, questions with 1 to 3 hops, and demonstrations."""

import argparse
import functools
import random
from collections import Counter
from collections.abc import Iterable, Sequence

from a2tgpo.environment.tools.search import NOTHING_FOUND
from a2tgpo.io.atomic_file import write_json
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.json_lines import write_lines
from a2tgpo.protocol.tag_syntax import SEARCH_CALLS
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.passage import Passage, format_passage

from worlds.worldqa_demonstrations import build_demonstrations, spread
from worlds.worldqa_facts import load_world
from worlds.worldqa_questions import Hop, Question, build_corpus, build_questions, split_countries

GOOD_SHARE = (0.6, 0.26, 0.2)
"""Shares of good demonstrations for 1, 2 and 3 hops. They are small, so that training has bad habits to remove."""


def build_worldqa(args: argparse.Namespace) -> dict:
    """Write the data set to the folder `args.out`, and return the content of its report."""
    world = load_world()
    corpus = build_corpus(world)
    index = Bm25Index(corpus)

    @functools.cache
    def search(query: str) -> tuple[Passage, ...]:
        return tuple(passage for passage, _ in index.search(query, args.top_k))

    def observe(query: str) -> str:
        passages = [format_passage(rank, p) for rank, p in enumerate(search(query), start=1)]
        return SEARCH_CALLS.format_result(passages or [NOTHING_FOUND])

    def answerable(hop: Hop) -> bool:
        """Return whether the passage that states the hop's fact is the first hit of the hop's query."""
        return search(hop.query)[0].id == hop.passage_id

    splits = {}
    for name, codes in zip(("train", "test"), split_countries(world, args.seed), strict=True):
        draw = random.Random(f"{name}-{args.seed}")
        questions = build_questions(world, codes, answerable)
        count = args.train_questions if name == "train" else args.test_questions
        splits[name] = {hops: unique(spread(pool, count // 3, draw)) for hops, pool in questions.items()}
        if not all(splits[name].values()):  # each chain's share is rounded, and may be 0
            raise ConfigError(
                f"--{name}-questions is {count}, too few for every number of hops; give 60 or more"
            )
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
    write_json(args.out / "report.json", report)
    return report


def unique(questions: Iterable[Question]) -> list[Question]:
    return list({question.id: question for question in questions}.values())


def interleave(questions: dict[int, list[Question]], seed: int) -> list[Question]:
    """Shuffle all questions so that, for any N, the first N have each number of hops about equally often."""
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
    """Return the report: counts from which a reader can check the composition of the data set."""
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
