"""Measure how a token credit changes the advantages of turns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from a2tgpo.batch.packing import PackedBatch
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.update.by_turn import sums_by_turn

_SUM, _COUNT = "credit/", "count of credit/"


def credit_sums(
    measured: Mapping[str, Tensor], inputs: LossInputs, of_turns: Tensor, batch: PackedBatch
) -> dict[str, Tensor]:
    """Return sums and counts of a micro-batch for the metrics `credit/NAME` and `credit/turn_T_factor`.

    `credit/turn_T_factor` is the sum of |A| of the tokens in turn T after the credit, divided by the sum before the
    credit.

    Args:
        measured: the measurements of the token credit.
        inputs: the loss's inputs, with the advantages after the credit.
        of_turns: [n] the advantages before the credit.
    """
    sums = {f"{_SUM}{name}": values.double().sum() for name, values in measured.items()}
    sums |= {f"{_COUNT}{name}": torch.tensor(float(values.numel())) for name, values in measured.items()}
    turn_index = batch.turn_index[inputs.turn_ids]
    sums["factors_by_turn"] = sums_by_turn(turn_index, inputs.advantages.abs())
    sums["advantages_by_turn"] = sums_by_turn(turn_index, of_turns.abs())
    return sums


def record_credit(metrics: MetricSums, sums: Mapping[str, Tensor]) -> None:
    """Record the metrics of a mini-batch's `credit_sums`. Without a token credit there are none."""
    for key in sums:
        if key.startswith(_SUM):
            metrics.add(key, float(sums[key]), float(sums[f"{_COUNT}{key.removeprefix(_SUM)}"]))
    if "factors_by_turn" in sums:
        pairs = zip(sums["factors_by_turn"].tolist(), sums["advantages_by_turn"].tolist(), strict=True)
        for turn, (after, before) in enumerate(pairs, start=1):
            if before:
                metrics.add(f"credit/turn_{turn}_factor", after, before)
