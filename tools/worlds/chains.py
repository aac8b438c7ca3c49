"""Generate the chains data set: calculations of one to six steps, one call each, and demonstrations.

The data set differs from worldqa in three points: questions need one to six calls, no call before the last one tells
much about the answer, and the agent searches for nothing.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from a2tgpo.config.tools import CalculatorConfig
from a2tgpo.environment.tools.calculator import Calculator
from a2tgpo.io.errors import require

from worlds.arithmetic import FINAL_THOUGHT, SYNTAX, write_set

MAX_STEPS = 6
MAX_CALLS = 8
"""Largest number of calls in a demonstration, including repeated ones."""
MAX_QUESTIONS = 60_000
"""Largest number of questions to draw. A sixth of them have one step, and only about 12,000 such chains exist."""
LARGEST = 999
"""Largest value after any step of a chain."""
GOOD_SHARE = 0.4
REPEATED_SHARE = 0.25
"""Probability that a demonstration repeats a call before it goes on."""
POOR_KINDS = ("early_stop", "early_stop", "early_stop", "miscopy", "guess", "malformed")
"""Kinds of poor demonstrations. A kind that is listed more often is drawn more often.

early_stop: leaves out at least the last step, and guesses.
miscopy: calculates one step with a wrong number.
guess: answers without a call.
malformed: gives the right answer with broken tags.
"""
PHRASES = {"+": "add {}", "-": "take away {}", "*": "multiply by {}"}


@dataclass(frozen=True)
class Chain:
    """One question: start with `start`, then apply `steps`, each a sign and a number, from left to right."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def values(self) -> list[int]:
        """The value after each step."""
        values, value = [], self.start
        for step in self.steps:
            value = apply(value, step)
            values.append(value)
        return values

    @property
    def text(self) -> str:
        return (
            ", ".join([f"Start with {self.start}", *(PHRASES[sign].format(n) for sign, n in self.steps)])
            + "."
        )


def apply(value: int, step: tuple[str, int]) -> int:
    sign, number = step
    return {"+": value + number, "-": value - number, "*": value * number}[sign]


def build_chains(args: argparse.Namespace) -> dict:
    """Write train.jsonl, test.jsonl, demonstrations.jsonl and report.json to `args.out`. Return the report.

    The questions have one to six steps, equally many of each.
    """
    count = args.train_questions + args.test_questions
    require(count <= MAX_QUESTIONS, "--train-questions + --test-questions", count, f"at most {MAX_QUESTIONS}")
    draw = random.Random(f"chains-{args.seed}")
    chains = list(distinct_chains(draw, count))
    records = [to_record(number, chain) for number, chain in enumerate(chains)]
    test, train = records[: args.test_questions], records[args.test_questions :]
    pool = list(zip(chains, records, strict=True))[args.test_questions :]
    demonstrations = [demonstrate(*pool[i % len(pool)], draw) for i in range(args.demonstrations)]
    return write_set(
        args.out,
        train=train,
        test=test,
        demonstrations=demonstrations,
        qualities=("good", *dict.fromkeys(POOR_KINDS)),
    )


def distinct_chains(draw: random.Random, count: int) -> Iterator[Chain]:
    """Yield `count` different chains, whose numbers of steps are 1, 2, ..., 6, 1, 2, ..."""
    seen: set[Chain] = set()
    while len(seen) < count:
        chain = draw_chain(draw, len(seen) % MAX_STEPS + 1)
        if chain not in seen:
            seen.add(chain)
            yield chain


def draw_chain(draw: random.Random, num_steps: int) -> Chain:
    """Return a chain whose values are all from 1 to `LARGEST`."""
    start = value = draw.randint(11, 99)
    steps: list[tuple[str, int]] = []
    while len(steps) < num_steps:
        sign = draw.choice("++--*")
        step = (sign, draw.randint(2, 5) if sign == "*" else draw.randint(11, 99))
        if 1 <= apply(value, step) <= LARGEST:
            steps.append(step)
            value = apply(value, step)
    return Chain(start, tuple(steps))


def to_record(number: int, chain: Chain) -> dict:
    answers = [str(chain.values[-1])]
    return {"id": f"chain-{number}", "question": chain.text, "answers": answers, "hops": len(chain.steps)}


def demonstrate(chain: Chain, record: dict, draw: random.Random) -> dict:
    """Return a demonstration for the question `record` of `chain`. It is good, or of a kind in `POOR_KINDS`."""
    kind = "good" if draw.random() < GOOD_SHARE else draw.choice(POOR_KINDS)
    steps: Sequence[tuple[str, int]] = chain.steps
    if kind == "guess":
        steps = ()
    if kind == "early_stop":
        steps = steps[: draw.randrange(len(steps))]
    wrong_at = draw.randrange(len(steps)) if kind == "miscopy" else None
    turns: list[dict] = []
    value = chain.start
    for number, (sign, operand) in enumerate(steps):
        if number == wrong_at:
            operand += draw.choice((-1, 1))
        call = f"{value} {sign} {operand}"
        spare = MAX_CALLS - len(turns) - (len(steps) - number)
        is_repeated = spare > 0 and draw.random() < REPEATED_SHARE
        turns += [call_turn("Next" if turns else "First", call)] * (1 + is_repeated)
        value = apply(value, (sign, operand))
    answer = str(value)
    if len(steps) < len(chain.steps):
        answer = str(draw.randint(1, LARGEST))
    last = f"{FINAL_THOUGHT}{answer}}} </answer>"
    if kind == "malformed":
        last = draw.choice([last.replace(" </think>", ""), last.replace(f"\\boxed{{{answer}}}", answer)])
    return {**record, "turns": [*turns, {"text": last}], "quality": kind}


def call_turn(ordinal: str, call: str) -> dict:
    (result,) = Calculator(CalculatorConfig()).call(call)
    text = f"<think> {ordinal}, calculate. </think> <calculator> {call} </calculator>"
    return {"text": text, "observation": SYNTAX.format_result([result])}
