"""Write a policy's adapters in the format of PEFT, so that other programs can load them onto the base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from a2tgpo.model.policy import Policy, gather_weights
from a2tgpo.model.weight_gather import gather_ahead, record_of
from a2tgpo.parallel.collectives import all_gather_object

ADAPTER_FOLDER = "adapter"
"""Folder of the adapters' files, in a checkpoint and in an exported model."""
_PREFIX = "base_model.model."
"""Prefix that PEFT adds to the parameter names of the model that it wraps."""


def adapter_files(policy: Policy) -> dict[str, bytes]:
    """Return PEFT's files with the policy's adapters, as a map from path to content. Every rank must call this.

    Rank 0 gets the files, and the other ranks get an empty map. A policy without adapters has no files. The tensors
    keep the training dtype.
    """
    if policy.adapters is None:
        return {}
    tensors = {}
    for name, tensor in iterate_adapters(policy):
        if policy.groups.rank == 0:
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    if policy.groups.rank != 0:
        return {}
    config = json.dumps(_peft_config(policy), indent=2)
    return {
        f"{ADAPTER_FOLDER}/adapter_config.json": config.encode(),
        f"{ADAPTER_FOLDER}/adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


@torch.no_grad()
def iterate_adapters(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Yield all adapters in full with PEFT's names. Every rank must call this and exhaust the iterator.

    Yields:
        (name, A [rank, inputs] or B [outputs, rank] in the model's dtype, on `policy.groups.device`), in the same
        order on all ranks. A tensor may share memory with the model.
    """
    assert policy.adapters is not None, "the policy has adapters"
    gather_weights(policy)
    groups = policy.groups
    local = {
        f"{_PREFIX}{projection.name}.lora_{letter}.weight": parameter
        for adapter in policy.adapters.by_weight.values()
        for projection in adapter.projections
        for letter, parameter in zip("AB", adapter.pair(projection), strict=True)
    }
    own = [record_of(groups.pp_rank, name, parameter) for name, parameter in local.items()]
    records = [record for of_stage in all_gather_object(own, groups.pp_group) for record in of_stage]
    for record, parts in gather_ahead(policy, records, local, bucket_bytes=0):
        yield record.name, parts[0] if len(parts) == 1 else torch.cat(parts, dim=record.split_dim or 0)


def _peft_config(policy: Policy) -> dict[str, Any]:
    """Return the content of PEFT's adapter_config.json."""
    assert policy.adapters is not None, "the policy has adapters"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": policy.path,
        "r": policy.adapters.config.rank,
        "lora_alpha": policy.adapters.config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(policy.adapters.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
