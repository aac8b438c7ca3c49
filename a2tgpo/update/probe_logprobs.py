"""Compute the trainer's log-probs of answers inserted at many positions of a sequence, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from a2tgpo.batch.balance import microbatches
from a2tgpo.batch.probes import ProbedSequence, pack_probes
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import from_last_stage
from a2tgpo.update.logprobs import compute_logprobs


def compute_probe_logprobs(
    policy: Policy, sequences: Sequence[ProbedSequence], *, max_tokens: int
) -> list[list[list[float]]]:
    """Return, for each sequence and probe, one log-prob per answer token, in nats.

    Each log-prob is conditioned on the prefix, the scaffold and the answer tokens before it. Every rank must call
    this. All ranks of a data-parallel replica must pass the same sequences, possibly none. All these ranks get the
    same result. The model runs `packed_length` positions per sequence, plus padding.

    Args:
        max_tokens: number of positions in one row. A longer sequence gets a row of its own.
    """
    rows = microbatches(
        [sequence.packed_length for sequence in sequences], max_tokens, row=policy.alignment.row
    )
    batches = [pack_probes(sequences, row, align=policy.alignment) for row in rows]
    found: list[list[list[float]]] = [[[] for _ in sequence.probes] for sequence in sequences]
    for batch, computed in zip(batches, compute_logprobs(policy, batches), strict=True):
        if computed is None:  # this rank is not on the last pipeline stage
            continue
        mask = batch.loss_mask[0]
        logprobs = computed.logprobs.cpu()[mask].tolist()
        for logprob, turn in zip(logprobs, batch.turn_ids[0, mask].tolist(), strict=True):
            found[batch.turn_trajectory[turn]][batch.turn_index[turn]].append(logprob)
    found = from_last_stage(found, policy.groups)
    return found
