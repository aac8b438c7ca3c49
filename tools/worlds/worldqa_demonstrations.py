"""Generate demonstrations for the warm start: good trajectories, and bad habits that training must remove."""

import math
import random
from collections.abc import Callable, Mapping, Sequence

from worlds.worldqa_questions import QUERIES, Hop, Question

Search = Callable[[str], str]
"""Returns the observation that a rollout would append for a query."""

FINAL_THOUGHT = "<think> I can answer now. </think> <answer> \\boxed{"
"""The text before the answer in every demonstration. It equals rollout.gain.scaffold."""

POOR_KINDS = {
    1: ("guess", "miscopy", "useless_query", "malformed"),
    2: ("early_stop",) * 7 + ("guess", "miscopy", "useless_query", "malformed"),
    3: ("early_stop",) * 7 + ("guess", "miscopy", "useless_query", "malformed"),
}
"""{number of hops: kinds of poor demonstrations}. A kind that is listed more often is drawn more often.

guess: answers without a search, with a wrong value of the right type.
early_stop: leaves out at least the last search, then guesses.
miscopy: finds the answer, but answers with the subject of its last query.
useless_query: searches with a query that names nothing in particular, then guesses.
malformed: gives the right answer with broken tags.
"""

MAX_SEARCHES = 6
"""Largest number of searches in a demonstration, including detours."""


def build_demonstrations(
    questions: Mapping[int, Sequence[Question]],
    *,
    num_demonstrations: int,
    good_share: dict[int, float],
    detour_share: float,
    search: Search,
    seed: int,
) -> list[dict]:
    """Return shuffled demonstrations as JSON records, equally many for each number of hops.

    Args:
        questions: training questions by number of hops.
        num_demonstrations: approximate number of records.
        good_share: {number of hops: share of the records that have `quality: good`}.
        detour_share: probability that a useless search comes before a search.
        search: returns the observation that a rollout would append for a query.
    """
    draw = random.Random(f"demonstrations-{seed}")
    records = []
    for num_hops, pool in sorted(questions.items()):
        picked = spread(pool, num_demonstrations // len(questions), draw)
        num_good = round(good_share[num_hops] * len(picked))
        kinds = ["good"] * num_good
        while len(kinds) < len(picked):
            kinds.append(POOR_KINDS[num_hops][(len(kinds) - num_good) % len(POOR_KINDS[num_hops])])
        draw.shuffle(kinds)
        answers = _answers_by_relation(pool)
        for question, kind in zip(picked, kinds, strict=True):
            turns = _turns(question, kind, answers, search, draw, detour_share)
            records.append({**question.to_dict(), "turns": turns, "quality": kind})
    draw.shuffle(records)
    return records


def spread(pool: Sequence[Question], count: int, draw: random.Random) -> list[Question]:
    """Return `count` questions from `pool`, drawn by chain of relations.

    The share of a chain is proportional to the square root of its number of questions. With equal shares, chains with
    few questions would repeat their names very often.
    """
    by_chain: dict[tuple[str, ...], list[Question]] = {}
    for question in draw.sample(list(pool), len(pool)):
        by_chain.setdefault(tuple(hop.relation for hop in question.hops), []).append(question)
    chains = sorted(by_chain)
    weights = [math.sqrt(len(by_chain[chain])) for chain in chains]
    picked = []
    for chain, weight in zip(chains, weights, strict=True):
        share = round(count * weight / sum(weights))
        picked += [by_chain[chain][i % len(by_chain[chain])] for i in range(share)]
    return picked


def _turns(
    question: Question,
    kind: str,
    answers: Mapping[str, Sequence[str]],
    search: Search,
    draw: random.Random,
    detour_share: float,
) -> list[dict]:
    """Return the turns of one demonstration for `question`.

    Args:
        kind: "good" or a kind of `POOR_KINDS`.
        answers: the result of `_answers_by_relation` for the questions with as many hops.
    """
    hops, answer = question.hops, question.hops[-1].answer.text
    turns: list[dict] = []
    if kind == "guess":
        return [{"text": _final(_wrong_answer(question, answers, draw))}]
    if kind == "useless_query":
        query = QUERIES[hops[-1].relation].format("it") if draw.random() < 0.5 else "the answer"
        turns.append(_search_turn("First", hops[0], query, search))
        return [*turns, {"text": _final(_wrong_answer(question, answers, draw))}]
    if kind == "early_stop":
        # Guess an answer. Answering with the last result would teach that results make the gold answer less probable.
        hops, answer = hops[: draw.randrange(1, len(hops))], _wrong_answer(question, answers, draw)
    for number, hop in enumerate(hops):
        spare = MAX_SEARCHES - len(turns) - (len(hops) - number)
        while spare > 0 and detour_share and draw.random() < detour_share:
            turns.append(_search_turn("Next" if turns else "First", hop, _detour(hop, draw), search))
            spare -= 1
        turns.append(_search_turn("Next" if turns else "First", hop, hop.query, search))
    if kind == "miscopy":
        answer = hops[-1].subject
    last = _final(answer)
    if kind == "malformed":
        last = draw.choice(
            [
                last.replace("\\boxed{" + answer + "}", answer),
                last.replace(" </think>", ""),
                last.replace(" <answer> \\boxed{" + answer + "} </answer>", f" {answer} </answer>"),
            ]
        )
    return [*turns, {"text": last}]


def _detour(hop: Hop, draw: random.Random) -> str:
    """Return a useless query about another relation of the same subject, or about no subject."""
    others = sorted(set(QUERIES) - {hop.relation})
    subject = hop.subject if draw.random() < 0.7 else "it"
    return QUERIES[draw.choice(others)].format(subject)


def _search_turn(ordinal: str, hop: Hop, query: str, search: Search) -> dict:
    wanted = QUERIES[hop.relation].removesuffix(" of {}")
    text = f"<think> {ordinal}, the {wanted}. </think> <search> {query} </search>"
    return {"text": text, "observation": search(query)}


def _final(answer: str) -> str:
    return f"{FINAL_THOUGHT}{answer}}} </answer>"


def _answers_by_relation(pool: Sequence[Question]) -> dict[str, list[str]]:
    """Return the sorted distinct answers to the questions in `pool`, by the relation of a question's last hop."""
    found: dict[str, set[str]] = {}
    for question in pool:
        found.setdefault(question.hops[-1].relation, set()).add(question.hops[-1].answer.text)
    return {relation: sorted(texts) for relation, texts in found.items()}


def _wrong_answer(question: Question, answers: Mapping[str, Sequence[str]], draw: random.Random) -> str:
    """Return the answer of another question. The answer has the type that `question` requires."""
    last = question.hops[-1]
    wrong = [text for text in answers[last.relation] if text != last.answer.text]
    # If there are very few questions, perhaps no other question has an answer of this type.
    return draw.choice(wrong) if wrong else last.subject
