"""Store the results of the checks as rows, and format the rows as a table or as JSON."""

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
    """One result of a check, which is one line of the table."""

    check: str
    """Name of the check in `catalogue.CHECKS`."""
    name: str
    status: str
    """One of PASS, FAIL, SKIP and INFO. INFO marks a measurement without a limit."""
    measured: float | None = None
    limit: float | None = None
    """The value that `measured` was compared with."""
    relation: str = ""
    """`<=` if `measured` must not exceed `limit`, `>=` if it must not be below `limit`."""
    unit: str = ""
    note: str = ""
    """Why the row failed or was skipped, or further observations."""
    quantity: str = ""
    """Name (in `QUANTITIES`) of the plan's assumption whose value `measured` can replace, or "" if there is none."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command-line options that the checks use."""

    min_bus_gb_s: float | None = None
    """Smallest accepted bus bandwidth of the largest all-reduce, GB/s. None means the backend's default."""
    lengths: tuple[int, ...] | None = None
    """Length in tokens of each sequence that the checks pack for a model with wide heads. None means long sequences
    on a GPU, and short ones on a CPU."""
    like: str | None = None
    """The model whose slice is checked: a built-in name, or a folder with config.json. None means `DEFAULT_LIKE` on a
    GPU and `STAND_IN` on a CPU."""
    tensor: int = 8
    """Tensor-parallel size of the model. The slice is the share of one rank."""
    layers: int = 4
    """Number of layers in the slice."""

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
    """The environment of a check on one rank. Only the rows of rank 0 are reported."""

    check: str
    work: Path
    """A folder to write to. Several ranks may share it, so every rank must use its own file names."""
    rank: int
    world_size: int
    settings: Settings = Settings()
    rows: list[Row] = field(default_factory=list)

    def at_most(
        self, name: str, measured: float, limit: float, unit: str = "", note: str = "", quantity: str = ""
    ) -> None:
        """Add a row: PASS if `measured` <= `limit`, FAIL if it is larger or NaN."""
        self._compare(name, measured <= limit, measured, limit, "<=", unit, note, quantity)

    def at_least(
        self, name: str, measured: float, limit: float, unit: str = "", note: str = "", quantity: str = ""
    ) -> None:
        """Add a row: PASS if `measured` >= `limit`, FAIL if it is smaller or NaN."""
        self._compare(name, measured >= limit, measured, limit, ">=", unit, note, quantity)

    def info(self, name: str, measured: float, unit: str, note: str = "", quantity: str = "") -> None:
        """Add an INFO row with a measurement that has no limit."""
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
        if self.rank == 0:  # write now, so that a later hang or crash loses no row
            write_json(self.work / f"{self.check}.json", as_json(self.rows))


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a text table with one line per row."""
    lines = []
    for row in rows:
        shown = ""
        if row.measured is not None:
            limit = "" if row.limit is None else f" {row.relation} {row.limit:.4g}"
            shown = f"{row.measured:.4g}{limit} {row.unit}".rstrip()
        lines.append(f"{row.status}  {row.name:<46}  {shown:<28}  {row.note}".rstrip())
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON types. Numbers that are not finite become null."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(row).items()
        }
        for row in rows
    ]


def verdict(rows: Sequence[Row]) -> str:
    """Return a line with the number of rows of each status."""
    passed, failed, skipped, measured = (sum(row.status == status for row in rows) for status in STATUSES)
    return f"{passed} passed, {failed} failed, {skipped} skipped, {measured} measured without a limit"
