"""Results of the checks: the rows that a check writes, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2tgpo.atomic_file import write_json
from a2tgpo.plan.measured import QUANTITIES

STATUSES = ("PASS", "FAIL", "SKIP", "INFO")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    check: str
    """The check that wrote it, of `catalogue.CHECKS`."""
    name: str
    status: str
    """PASS | FAIL | SKIP | INFO (measured, without a limit)."""
    measured: float | None = None
    limit: float | None = None
    """What `measured` was compared with."""
    relation: str = ""
    """How: `<=` or `>=`."""
    unit: str = ""
    note: str = ""
    """Why it failed or was skipped; otherwise, what else was seen."""
    quantity: str = ""
    """Of `QUANTITIES`: what `measured` calibrates in a plan; empty if nothing."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says to the checks."""

    min_bus_gb_s: float | None = None
    """Least bus bandwidth of the largest all-reduce, GB/s; None: by backend."""
    lengths: tuple[int, ...] | None = None
    """Tokens of the packed sequences with wide heads; None: long ones on a GPU, short ones on a CPU."""
    like: str | None = None
    """The model whose slice is checked: a built-in name or a folder with config.json; None: by machine."""
    tensor: int = 8
    """The slice is the part of one of this many tensor-parallel ranks."""
    layers: int = 4
    """Layers of the slice."""

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def dumps(self) -> str:
        return json.dumps(self.as_json())

    @staticmethod
    def loads(text: str) -> Settings:
        values = json.loads(text)
        lengths = values.pop("lengths")
        return Settings(lengths=None if lengths is None else tuple(lengths), **values)


@dataclass(kw_only=True)
class Bench:
    """What a check is given: where to write, and which rank it is; the rows of rank 0 are the check's."""

    check: str
    work: Path
    """A folder to write to. Ranks may share it or not: each writes under names of its own."""
    rank: int
    world_size: int
    settings: Settings = Settings()
    rows: list[Row] = field(default_factory=list)

    def at_most(
        self, name: str, measured: float, limit: float, unit: str = "", note: str = "", quantity: str = ""
    ) -> None:
        """PASS if `measured` <= `limit`; a NaN fails."""
        self._compare(name, measured <= limit, measured, limit, "<=", unit, note, quantity)

    def at_least(
        self, name: str, measured: float, limit: float, unit: str = "", note: str = "", quantity: str = ""
    ) -> None:
        """PASS if `measured` >= `limit`; a NaN fails."""
        self._compare(name, measured >= limit, measured, limit, ">=", unit, note, quantity)

    def info(self, name: str, measured: float, unit: str, note: str = "", quantity: str = "") -> None:
        """A measurement without a limit."""
        self._add(name=name, status="INFO", measured=measured, unit=unit, note=note, quantity=quantity)

    def skip(self, name: str, reason: str) -> None:
        self._add(name=name, status="SKIP", note=reason)

    def _compare(
        self,
        name: str,
        passed: bool,
        measured: float,
        limit: float,
        relation: str,
        unit: str,
        note: str,
        quantity: str,
    ) -> None:
        self._add(
            name=name,
            status="PASS" if passed else "FAIL",
            measured=measured,
            limit=limit,
            relation=relation,
            unit=unit,
            note=note,
            quantity=quantity,
        )

    def _add(self, **columns: Any) -> None:
        row = Row(check=self.check, **columns)
        assert not row.quantity or row.quantity in QUANTITIES, row.quantity
        self.rows.append(row)
        if self.rank == 0:  # at once: what was measured before a hang or a crash is kept
            write_json(self.work / f"{self.check}.json", as_json(self.rows))


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a line each."""
    lines = []
    for row in rows:
        shown = ""
        if row.measured is not None:
            limit = "" if row.limit is None else f" {row.relation} {row.limit:.4g}"
            shown = f"{row.measured:.4g}{limit} {row.unit}".rstrip()
        lines.append(f"{row.status}  {row.name:<46}  {shown:<28}  {row.note}".rstrip())
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON knows them: what is not finite becomes null."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(row).items()
        }
        for row in rows
    ]


def verdict(rows: Sequence[Row]) -> str:
    """How many rows of each status, in one line."""
    passed, failed, skipped, measured = (sum(row.status == status for row in rows) for status in STATUSES)
    return f"{passed} passed, {failed} failed, {skipped} skipped, {measured} measured without a limit"
