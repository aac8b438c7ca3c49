"""Results of the checks: rows, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2tgpo.io.atomic_file import write_json
from a2tgpo.plan.measured import QUANTITIES

STATUSES = ("PASS", "FAIL", "SKIP", "INFO")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    check: str
    """The check that wrote the row, from `catalogue.CHECKS`."""
    name: str
    status: str
    """PASS | FAIL | SKIP | INFO (measured, without a limit)."""
    measured: float | None = None
    limit: float | None = None
    """The limit that `measured` was compared with."""
    relation: str = ""
    """The comparison: `<=` or `>=`."""
    unit: str = ""
    note: str = ""
    """Why the row failed or was skipped; otherwise, additional observations."""
    quantity: str = ""
    """The entry of `QUANTITIES` that `measured` calibrates in a plan; empty if none."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Command-line options for the checks."""

    min_bus_gb_s: float | None = None
    """Least bus bandwidth of the largest all-reduce, GB/s; None: the default of the backend."""
    lengths: tuple[int, ...] | None = None
    """Tokens of the packed sequences with wide heads; None: long sequences on a GPU, short ones on a CPU."""
    like: str | None = None
    """The model whose slice is checked: a built-in name or a folder with config.json; None: the default of the
    machine.
    """
    tensor: int = 8
    """The slice is one rank's part with this many tensor-parallel ranks."""
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
    """A check's folder, rank and rows; only the rows of rank 0 count."""

    check: str
    work: Path
    """A folder to write to. Ranks may share the folder, so each uses its own file names."""
    rank: int
    world_size: int
    settings: Settings = Settings()
    rows: list[Row] = field(default_factory=list)

    def at_most(
        self, name: str, measured: float, limit: float, unit: str = "", note: str = "", quantity: str = ""
    ) -> None:
        """Add PASS if `measured` <= `limit`, else FAIL, also for NaN."""
        self._compare(name, measured <= limit, measured, limit, "<=", unit, note, quantity)

    def at_least(
        self, name: str, measured: float, limit: float, unit: str = "", note: str = "", quantity: str = ""
    ) -> None:
        """Add PASS if `measured` >= `limit`, else FAIL, also for NaN."""
        self._compare(name, measured >= limit, measured, limit, ">=", unit, note, quantity)

    def info(self, name: str, measured: float, unit: str, note: str = "", quantity: str = "") -> None:
        """Add a measurement without a limit."""
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
        if self.rank == 0:  # written at once, so that a later hang or crash loses no measurement
            write_json(self.work / f"{self.check}.json", as_json(self.rows))


def table(rows: Sequence[Row]) -> str:
    """Format the rows as text, one line each."""
    lines = []
    for row in rows:
        shown = ""
        if row.measured is not None:
            limit = "" if row.limit is None else f" {row.relation} {row.limit:.4g}"
            shown = f"{row.measured:.4g}{limit} {row.unit}".rstrip()
        lines.append(f"{row.status}  {row.name:<46}  {shown:<28}  {row.note}".rstrip())
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Convert the rows to JSON types; values that are not finite become null."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(row).items()
        }
        for row in rows
    ]


def verdict(rows: Sequence[Row]) -> str:
    """Return the number of rows of each status, in one line."""
    passed, failed, skipped, measured = (sum(row.status == status for row in rows) for status in STATUSES)
    return f"{passed} passed, {failed} failed, {skipped} skipped, {measured} measured without a limit"
