"""The outcomes of a program of tests/distributed, one per claim, so that each claim is a test of its own."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist


class Claims:
    """Collects the outcomes of claims. An outcome is empty if the claim holds on every rank, and otherwise the fault
    that the first failing rank reports.
    """

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def check(self, claim: str, check: Callable[..., Any], *arguments: Any) -> Any:
        """Call `check` on every rank. Return the result of `check`, or None if `check` raised an error on this rank.

        If a fault on one rank leaves another rank waiting in a collective, the collective's time-out ends the wait.
        """
        result, fault = None, ""
        try:
            result = check(*arguments)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error}"[:800]
            fault = f"rank {dist.get_rank()}: {said} ({place.name}, line {place.lineno})"
        faults = [""] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
        self.outcomes[claim] = next(filter(None, faults), "")
        if dist.get_rank() == 0:
            print(f"{claim}: {self.outcomes[claim] or 'holds'}", flush=True)
        return result

    def save(self, path: str | Path) -> None:
        if dist.get_rank() == 0:
            Path(path).write_text(json.dumps(self.outcomes))
