"""Generate the arithmetic data set: sums that need a calculator, and demonstrations that use the calculator."""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from a2tgpo.config.tools import CalculatorConfig
from a2tgpo.environment.tools.calculator import Calculator
from a2tgpo.io.atomic_file import write_json
from a2tgpo.io.errors import require
from a2tgpo.io.json_lines import write_lines
from a2tgpo.protocol.tag_syntax import CallSyntax

SYNTAX = CallSyntax(("calculator",))
WORDS = {"+": "plus", "-": "minus", "*": "times"}
FINAL_THOUGHT = "<think> I can answer now. </think> <answer> \\boxed{"
"""The text before the answer in every demonstration. It equals rollout.gain.scaffold."""
MAX_QUESTIONS = 1_000_000
"""Largest number of questions to draw. 43.7 million exist, but drawing the last of them would take very long."""
GOOD_SHARE = 0.5
"""Share of demonstrations that use the calculator. The other demonstrations guess."""


def build_arithmetic(args: argparse.Namespace) -> dict:
    """Write train.jsonl, test.jsonl, demonstrations.jsonl and report.json to `args.out`. Return the report."""
    count = args.train_questions + args.test_questions
    require(count <= MAX_QUESTIONS, "--train-questions + --test-questions", count, f"at most {MAX_QUESTIONS}")
    draw = random.Random(f"arithmetic-{args.seed}")
    questions = list(distinct_questions(draw, count))
    test, train = questions[: args.test_questions], questions[args.test_questions :]
    demonstrations = [demonstrate(train[i % len(train)], draw) for i in range(args.demonstrations)]
    return write_set(
        args.out,
        train=[without_sum(question) for question in train],
        test=[without_sum(question) for question in test],
        demonstrations=demonstrations,
        qualities=("good", "guess"),
    )


def write_set(
    out: Path, *, train: list[dict], test: list[dict], demonstrations: list[dict], qualities: Sequence[str]
) -> dict:
    """Write the records of a data set and report.json to `out`. Return the report, which counts the records.

    Args:
        qualities: the values of `quality` in the demonstrations, in the order of the report.
    """
    write_lines(out / "train.jsonl", train)
    write_lines(out / "test.jsonl", test)
    write_lines(out / "demonstrations.jsonl", demonstrations)
    report = {
        "questions": {"train": len(train), "test": len(test)},
        "demonstrations": {
            quality: sum(record["quality"] == quality for record in demonstrations) for quality in qualities
        },
    }
    write_json(out / "report.json", report)
    return report


def distinct_questions(draw: random.Random, count: int) -> Iterator[dict]:
    """Yield `count` questions, each for the value of a different expression."""
    calculator = Calculator(CalculatorConfig())
    seen: set[str] = set()
    while len(seen) < count:
        sign, last = draw.choice("+-*"), draw.choice("+-")
        numbers = [draw.randint(11, 99), draw.randint(11, 99), draw.randint(100, 999)]
        expression = f"{numbers[0]} {sign} {numbers[1]} {last} {numbers[2]}"
        if expression in seen:
            continue
        seen.add(expression)
        text = f"What is {numbers[0]} {WORDS[sign]} {numbers[1]} {WORDS[last]} {numbers[2]}?"
        yield {
            "id": f"sum-{len(seen)}",
            "question": text,
            "answers": calculator.call(expression),
            "hops": 1,
            "sum": expression,
        }


def without_sum(question: dict) -> dict:
    return {name: value for name, value in question.items() if name != "sum"}


def demonstrate(question: dict, draw: random.Random) -> dict:
    """Return one demonstration, which either uses the calculator or guesses a wrong answer."""
    (right,) = question["answers"]
    if draw.random() >= GOOD_SHARE:
        guess = str(int(right) + draw.choice((-100, -10, 10, 100)))
        return _record(question, [(f"{FINAL_THOUGHT}{guess}}} </answer>", None)], "guess")
    call = f"<think> I should calculate. </think> <calculator> {question['sum']} </calculator>"
    turns = [(call, SYNTAX.format_result([right])), (f" {FINAL_THOUGHT}{right}}} </answer>", None)]
    return _record(question, turns, "good")


def _record(question: dict, turns: Sequence[tuple[str, str | None]], quality: str) -> dict:
    written = [{"text": text, **({"observation": seen} if seen else {})} for text, seen in turns]
    return {**without_sum(question), "turns": written, "quality": quality}
