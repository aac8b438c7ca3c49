"""The calculator tool, which evaluates one arithmetic expression exactly, without executing it as Python.

Numbers are stored as fractions, so 0.1 + 0.2 is 0.3. An expression may contain + - * / // % **, parentheses, signs,
and the functions abs, round, min, max and sqrt. Values have at most `calculator.max_digits` digits, so no expression
takes long.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from a2tgpo.config.run import RunConfig
from a2tgpo.config.tools import CalculatorConfig

MAX_CHARACTERS = 500
MAX_NODES = 200
_BITS_PER_DIGIT = Fraction(10, 3)
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**"})
_FULL_WIDTH = {code + 0xFEE0: code for code in range(0x21, 0x7F)}
"""Maps full-width digits and signs to their ASCII forms."""
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class _Refusal(ValueError):
    """Raised if an expression has no value. The message gives the reason in a few words."""


class Calculator:
    """Answers a call with the value of the expression, or with a text that names the error in the expression."""

    description = "Evaluates an arithmetic expression exactly."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {
            "expression": {
                "type": "string",
                "description": "Numbers, + - * / // % **, parentheses, functions.",
            }
        },
        "required": ["expression"],
    }

    def __init__(self, config: CalculatorConfig):
        self._max_digits = config.max_digits
        self._decimals = config.decimals

    def call(self, text: str) -> list[str]:
        try:
            return [self._show(self._value(text))]
        except _Refusal as refusal:
            return [f"Error: {refusal}"]

    def close(self) -> None:
        """Do nothing, because the calculator has no resources."""

    def _value(self, text: str) -> Fraction:
        if len(text) > MAX_CHARACTERS:
            raise _Refusal(f"an expression has at most {MAX_CHARACTERS} characters")
        source = text.translate(_FULL_WIDTH).strip().removesuffix("=").translate(_SIGNS).strip()
        if not re.search(r"[a-z]", source):  # a comma may separate a function's arguments
            source = _THOUSANDS.sub("", source)
        try:
            tree = ast.parse(source, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise _Refusal("not an arithmetic expression") from None
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            raise _Refusal("the expression is too long")
        return self._evaluate(tree.body, source)

    def _evaluate(self, node: ast.expr, source: str) -> Fraction:
        match node:
            case ast.Constant(value=value) if type(value) in (int, float):
                # Read the number from its digits, so that 0.1 is a tenth and not the nearest binary number.
                return self._bounded(_parse_number(ast.get_source_segment(source, node) or ""))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                magnitude = self._evaluate(operand, source)
                return -magnitude if isinstance(sign, ast.USub) else magnitude
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return self._power(self._evaluate(left, source), self._evaluate(right, source))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                a, b = self._evaluate(left, source), self._evaluate(right, source)
                if b == 0 and isinstance(op, ast.Div | ast.FloorDiv | ast.Mod):
                    raise _Refusal("division by zero")
                return self._bounded(Fraction(_OPERATORS[type(op)](a, b)))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
                values = [self._evaluate(argument, source) for argument in args]
                return self._bounded(_FUNCTIONS[name](values))
        raise _Refusal(f"only numbers, + - * / // % **, parentheses and {', '.join(_FUNCTIONS)} are allowed")

    def _power(self, base: Fraction, exponent: Fraction) -> Fraction:
        if base == 0 and exponent < 0:
            raise _Refusal("division by zero")
        if exponent.denominator != 1:
            if base < 0:
                raise _Refusal("no real root of a negative number")
            try:
                return self._bounded(Fraction(float(base) ** float(exponent)))
            except OverflowError:
                raise self._too_large() from None
        bits = max(abs(base.numerator), base.denominator).bit_length() - 1
        if abs(exponent) * bits > self._max_digits * _BITS_PER_DIGIT:
            raise self._too_large()
        return self._bounded(base ** int(exponent))

    def _bounded(self, value: Fraction) -> Fraction:
        if max(abs(value.numerator), value.denominator).bit_length() > self._max_digits * _BITS_PER_DIGIT:
            raise self._too_large()
        return value

    def _too_large(self) -> _Refusal:
        return _Refusal(f"the result has more than {self._max_digits} digits")

    def _show(self, value: Fraction) -> str:
        if value.denominator == 1:
            return str(value.numerator)
        with localcontext() as context:
            context.prec = self._max_digits + self._decimals
            rounded = round(Decimal(value.numerator) / Decimal(value.denominator), self._decimals)
            return f"{rounded.normalize():f}"


def _parse_number(text: str) -> Fraction:
    try:
        number = Decimal(text)
    except ArithmeticError:
        raise _Refusal(f"{text:.20} is not a decimal number") from None
    if abs(number.adjusted()) > 10_000:
        raise _Refusal("the number is too large or too small")
    return Fraction(number)


def _one(name: str, values: list[Fraction]) -> Fraction:
    if len(values) != 1:
        raise _Refusal(f"{name} takes one number")
    return values[0]


def _some(name: str, values: list[Fraction]) -> list[Fraction]:
    if not values:
        raise _Refusal(f"{name} takes numbers")
    return values


def _round(values: list[Fraction]) -> Fraction:
    if len(values) not in (1, 2) or (
        len(values) == 2 and (values[1].denominator != 1 or abs(values[1]) > 50)
    ):
        raise _Refusal("round takes a number and, if wanted, a number of decimals")
    return Fraction(round(values[0], int(values[1]))) if len(values) == 2 else Fraction(round(values[0]))


def _sqrt(values: list[Fraction]) -> Fraction:
    value = _one("sqrt", values)
    if value < 0:
        raise _Refusal("no real root of a negative number")
    roots = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if (roots[0] ** 2, roots[1] ** 2) == (value.numerator, value.denominator):
        return Fraction(*roots)
    # An irrational root is cut after twenty decimal places.
    return Fraction(math.isqrt(value.numerator * 10**40 // value.denominator), 10**20)


_OPERATORS: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[list[Fraction]], Fraction]] = {
    "abs": lambda values: abs(_one("abs", values)),
    "round": _round,
    "min": lambda values: min(_some("min", values)),
    "max": lambda values: max(_some("max", values)),
    "sqrt": _sqrt,
}


def build(config: RunConfig) -> Calculator:
    return Calculator(config.calculator)
