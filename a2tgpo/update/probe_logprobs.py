"""The trainer's log-probs of answers at many places of sequences, in one pass per sequence."""

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
    """Return log p of each answer token given prefix, scaffold and the answer tokens before it, nats.

    Every rank must call this, each data-parallel replica with its own sequences, possibly none, the same on all of
    the replica's ranks. The model runs `packed_length` positions per sequence, plus padding.

    Args:
        max_tokens: positions of one row; a longer sequence gets its own row.

    Returns:
        Per sequence and probe, one value per answer token; equal on all ranks of a data-parallel replica.
    """
    rows = microbatches(
        [sequence.packed_length for sequence in sequences], max_tokens, row=policy.alignment.row
    )
    batches = [pack_probes(sequences, row, align=policy.alignment) for row in rows]
    found: list[list[list[float]]] = [[[] for _ in sequence.probes] for sequence in sequences]
    for batch, computed in zip(batches, compute_logprobs(policy, batches), strict=True):
        if computed is None:  # not the last pipeline stage
            continue
        mask = batch.loss_mask[0]
        logprobs = computed.logprobs.cpu()[mask].tolist()
        for logprob, turn in zip(logprobs, batch.turn_ids[0, mask].tolist(), strict=True):
            found[batch.turn_trajectory[turn]][batch.turn_index[turn]].append(logprob)
    found = from_last_stage(found, policy.groups)
    return found
