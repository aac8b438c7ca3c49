"""Give a layer a value for each micro-batch, also when the backward pass computes the layer again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class PassValue(Generic[T]):
    """The value that one layer has for the present micro-batch. None: the layer has no value.

    A forward pass of the layer lies between `begin` and `end`. If the backward pass computes the layer again, it does
    so outside this interval. For each chunk, Megatron's schedules run the backward passes of the micro-batches in the
    order of their forward passes, so the kept values are a queue.
    """

    def __init__(self) -> None:
        self._value: T | None = None
        self._in_pass = False
        self._kept: deque[T | None] = deque()

    def begin(self, value: T | None, *, keeps: bool) -> None:
        """Begin a forward pass. `keeps`: whether the backward pass will compute the layer again."""
        self._in_pass, self._value = True, value
        if keeps:
            self._kept.append(value)

    def end(self) -> None:
        """End the forward pass."""
        self._in_pass, self._value = False, None

    def take(self) -> T | None:
        """Return the value of the micro-batch. The layer must call this once each time that it is computed."""
        if not self._in_pass and self._kept:
            return self._kept.popleft()
        return self._value

    @property
    def is_spent(self) -> bool:
        """Whether the layer was computed again for each forward pass whose value was kept."""
        return not self._kept


def check_spent(values: Mapping[int, PassValue], *, what: str) -> None:
    """Raise RuntimeError if the backward pass computed a layer fewer times than the forward pass did.

    Args:
        values: the values of each layer, by the number that the error names.
        what: the name of the values in the error.
    """
    left = [layer for layer, value in values.items() if not value.is_spent]
    if left:
        raise RuntimeError(f"{what}: the backward pass did not reach layers {left}")
