"""Read each weight of a checkpoint on one rank, and send the weight to the other ranks that need it.

If every data-parallel rank read all its weights itself, the shared storage would have to deliver the same weights
many times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from a2tgpo.parallel.collectives import device_of
from a2tgpo.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Shared:
    """A parameter that is equal on all ranks of `group`, and the rank that reads it."""

    parameter: Tensor
    owner: int
    """The position in `group` of the rank that reads the parameter."""
    group: ProcessGroup


def share_reads(models: dict[str, dict[str, Any]], groups: ParallelGroups) -> list[Shared]:
    """Delete from `models` the parameters that other ranks read, and return all shared parameters.

    Every rank must call this. Every rank still reads all entries that are not parameters.

    Args:
        models: sharded state dicts of the model chunks, with the model's own parameters and no copies.
    """
    shared = []
    loads: dict[ProcessGroup, list[int]] = {}
    for state in models.values():
        for name, part in list(state.items()):
            parameter = part.data
            if not isinstance(parameter, torch.nn.Parameter):
                continue
            # Megatron sets `allreduce` to False if the gradient is not reduced over all data-parallel ranks.
            is_expert = not getattr(parameter, "allreduce", True)
            group = groups.edp_group if is_expert else groups.dp_cp_group
            load = loads.setdefault(group, [0] * group.size())
            owner = load.index(min(load))
            load[owner] += parameter.nbytes
            shared.append(Shared(parameter, owner, group))
            if group.rank() == owner:
                part.replica_id = (*part.replica_id[:2], 0)
            else:
                del state[name]
    return shared


@torch.no_grad()
def send_shared(shared: list[Shared]) -> None:
    """Send each parameter from the rank that read it to the other ranks of its group; every rank must call this."""
    for item in shared:
        if item.group.size() == 1:
            continue
        # Send the parameter as bytes, because gloo does not support all dtypes that models use.
        own = item.parameter.detach().view(-1).view(torch.uint8)
        sent = own.to(device_of(item.group))
        dist.broadcast(sent, group_src=item.owner, group=item.group)
        if sent is not own:
            own.copy_(sent)
