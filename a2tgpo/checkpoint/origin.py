"""Describe the policy that a checkpoint was saved from, and refuse a checkpoint of another policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from a2tgpo.checkpoint.optimizer_shards import is_distributed
from a2tgpo.model.fingerprint import base_fingerprint
from a2tgpo.model.hf_config import architecture_of
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import all_gather_object, world_group


def origin_of(policy: Policy) -> dict[str, dict[str, Any]]:
    """Return the layout of the ranks, the model's architecture and its adapters, as `state.json` records them."""
    groups = policy.groups
    sizes = {"tp": groups.tp_size, "cp": groups.cp_size, "pp": groups.pp_size}
    sizes |= {"dp": groups.dp_size, "ep": groups.ep_size}
    lora: dict[str, Any] = {"rank": 0}
    if policy.adapters is not None:
        lora = dataclasses.asdict(policy.adapters.config) | {"targets": list(policy.adapters.targets)}
    return {"layout": sizes, "model": architecture_of(policy.hf_config), "lora": lora}


def require_same_model(path: Path, record: dict[str, Any], hf_config: PretrainedConfig) -> None:
    """Raise a one-line ValueError if `record` describes a model other than `hf_config`; one process may call this.

    Shapes alone do not tell two models apart, because Megatron pads vocabularies and a load skips unknown keys. A
    checkpoint that records no architecture is accepted.
    """
    mine = architecture_of(hf_config)
    saved = record.get("model", mine)
    differing = [
        f"{name} {saved.get(name)} (here {mine.get(name)})"
        for name in sorted(mine.keys() | saved.keys())
        if saved.get(name) != mine.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} does not fit the model at model.path: it was saved from a model with "
            f"{', '.join(differing)}; give "
            "the model.path of its run"
        )


def require_same_adapters(path: Path, record: dict[str, Any], policy: Policy) -> None:
    """Raise a one-line ValueError if the saved policy and `policy` have different adapters."""
    mine = origin_of(policy)["lora"]
    saved = record.get("lora", {"rank": 0})  # a checkpoint of a run without adapters, or an older one
    if saved != mine:
        settings = " ".join(f"model.lora.{name}={_as_argument(value)}" for name, value in saved.items())
        raise ValueError(f"{path} was saved with other adapters, {settings}; give these settings")


def base_of(policy: Policy) -> list[str]:
    """Return a fingerprint of each rank's frozen weights, by rank. Every rank must call this.

    The list is empty if the policy has no adapters.
    """
    return [] if policy.adapters is None else all_gather_object(base_fingerprint(policy), world_group())


def require_same_base(path: Path, record: dict[str, Any], policy: Policy) -> None:
    """Raise a one-line ValueError if the saved adapters belong to other weights. Every rank must call this.

    The weights are compared only if the saving run had the same layout.
    """
    if policy.adapters is None or record["layout"] != origin_of(policy)["layout"]:
        return
    if record.get("base") != base_of(policy):
        raise ValueError(
            f"{path} has adapters of other weights than those now at model.path {policy.path!r}; put the weights of "
            "its run back"
        )


def _as_argument(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def require_same_optimizer(path: Path, record: dict[str, Any], optimizer: Any) -> None:
    """Raise a one-line ValueError if only one of the saved optimizer and `optimizer` is distributed."""
    mine = is_distributed(optimizer)
    saved = record.get("distributed_optimizer", mine)  # an older checkpoint has no such record
    if saved != mine:
        raise ValueError(
            f"{path} was saved with update.distributed_optimizer={str(saved).lower()}, which its optimizer state "
            "requires; set it"
        )
