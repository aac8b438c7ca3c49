"""Load and export weights. mbridge converts between the names and layouts of Hugging Face and those of Megatron."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from a2tgpo.config.families import FAMILIES
from a2tgpo.data.weight_files import weight_files
from a2tgpo.io.atomic_file import atomic_folder, write_json
from a2tgpo.io.errors import ConfigError, first_line
from a2tgpo.model.adapter_files import adapter_files
from a2tgpo.model.experts import expert_names, is_expert
from a2tgpo.model.lora import Adapters, is_adapter
from a2tgpo.model.policy import Policy, gather_weights
from a2tgpo.model.weight_gather import ParameterRecord, gather_ahead, record_of
from a2tgpo.parallel.collectives import all_gather_object, broadcast_object, world_group

_OUTPUT = "output_layer.weight"

MAX_FILE_BYTES = 4 * 2**30
"""Largest size of a weight file. A larger tensor is written to a file of its own."""

_COMPANIONS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
TEMPLATE_FILE = "chat_template.jinja"
"""Name of a file in the tokenizer's folder. transformers prefers its template to the one in tokenizer_config.json."""
_TEMPLATES = ("chat_template*", "additional_chat_templates")


def make_bridge(hf_config: PretrainedConfig, config: TransformerConfig, *, padded_vocab_size: int) -> Any:
    """Return mbridge's weight tables for this architecture and the Megatron configuration `config`."""
    # Import mbridge here, because the import takes seconds.
    from mbridge.core.bridge import _MODEL_REGISTRY

    base = _MODEL_REGISTRY[FAMILIES[hf_config.model_type].weight_table]
    direct = dict(base._DIRECT_MAPPING)
    direct[_OUTPUT] = "model.embed_tokens.weight" if hf_config.tie_word_embeddings else "lm_head.weight"
    # Create a class for each bridge, because a bridge with tied embeddings changes a table of its class. Replace
    # `_build_config`, because it reads attributes that transformers 5 does not have.
    members = {
        "_DIRECT_MAPPING": direct,
        "_adjust_mapping_for_shared_weights": lambda bridge: None,
        "_build_config": lambda bridge: config,
    }
    bridge = type(base.__name__, (base,), members)(hf_config, dtype=config.params_dtype)
    bridge.vocab_size = hf_config.vocab_size
    bridge.padded_vocab_size = bridge.make_vocab_size_divisible_by = padded_vocab_size
    return bridge


@torch.no_grad()
def load_hf_weights(policy: Policy) -> None:
    """Copy the checkpoint in `policy.path` into the model. Every rank must call this.

    Raises:
        ConfigError: with the same one-line message on every rank, if a tensor is missing or has the wrong shape, if a
            file is damaged, or if the checkpoint holds tensors that this architecture does not have.
    """
    problem, used, known = None, set(), set()
    with ExitStack() as files:
        try:
            tensors = _open_tensors(policy.path, files)
            known = set(tensors)
            for model in policy.gpt_models:
                used |= _load_model(policy, model, tensors)
        except ConfigError as error:
            problem = str(error)
    # If one rank finds a bad file, all ranks must stop. Otherwise the other ranks would wait in a collective.
    results = all_gather_object((problem, used), world_group())
    for problem, _ in results:
        if problem is not None:
            raise ConfigError(problem)
    unused = known.difference(*(names for _, names in results), _derived_names(policy, known))
    if unused:
        raise ConfigError(
            f"model.path {policy.path!r} has tensors that a {policy.hf_config.model_type} model does not use: "
            f"{', '.join(sorted(unused)[:3])}{' ...' if len(unused) > 3 else ''}"
        )


def _derived_names(policy: Policy, names: set[str]) -> set[str]:
    """Return those of `names` whose tensors are redundant, because other values determine them."""
    tied = {"lm_head.weight"} if policy.tied_embeddings else set()
    return tied | {name for name in names if name.endswith("rotary_emb.inv_freq")}


def _open_tensors(path: str, files: ExitStack) -> dict[str, Any]:
    """Return the open safetensors file of each tensor, by the tensor's name."""
    tensors: dict[str, Any] = {}
    for file in weight_files(path).values():
        handle = files.enter_context(safe_open(file, framework="pt"))
        tensors.update(dict.fromkeys(handle.keys(), handle))
    return tensors


def _load_model(policy: Policy, model: GPTModel, tensors: dict[str, Any]) -> set[str]:
    """Copy the weights into `model`, and return the names of the Hugging Face tensors that were used."""
    used = set()
    for global_name, parameter in _named_parameters(policy, model):
        hf_names = policy.bridge._weight_name_mapping_mcore_to_hf(global_name)
        missing = [name for name in hf_names if name not in tensors]
        if missing:
            raise ConfigError(
                f"model.path {policy.path!r}: tensor {missing[0]} is missing from its safetensors"
            )
        hf_tensors = [tensors[name].get_tensor(name) for name in hf_names]
        try:
            full = policy.bridge._weight_to_mcore_format(global_name, hf_tensors)
            if is_expert(global_name):
                shard = full
            else:
                shards = policy.bridge._weight_split_across_tp(
                    global_name, full, parameter, policy.groups.tp_size
                )
                shard = shards[policy.groups.tp_rank]
            if shard.shape != parameter.shape:
                raise ValueError(f"need {tuple(parameter.shape)}, got {tuple(shard.shape)}")
        except (AssertionError, RuntimeError, ValueError) as error:
            shapes = ", ".join(
                f"{name} {tuple(t.shape)}" for name, t in zip(hf_names, hf_tensors, strict=True)
            )
            raise ConfigError(
                f"model.path {policy.path!r}: config.json and weights disagree: {shapes} do not fit {global_name}"
            ) from error
        parameter.copy_(shard)
        used.update(hf_names)
    return used


def _named_parameters(policy: Policy, model: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's parameters, without those of adapters, with their global names.

    A global name has the layer's number in the whole model and the expert's number in the whole layer.
    """
    global_names = policy.bridge._weight_name_mapping_mcore_local_to_global(model)
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            yield global_names[name], parameter


class _MergedWeights(Mapping[str, torch.Tensor]):
    """This rank's parts of the weights by global name. An adapter is added to a part whenever the part is read."""

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], adapters: Adapters) -> None:
        self._weights, self._adapters = weights, adapters.by_weight

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, adapter = self._weights[name], self._adapters.get(name)
        return weight if adapter is None else adapter.merged(weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@torch.no_grad()
def iterate_hf_weights(policy: Policy, *, bucket_bytes: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all weights in full with their Hugging Face names. Every rank must call this and exhaust the iterator.

    All ranks get the same tensors in the same order. A tensor may share memory with the model, so read it before you
    request the next tensor, and do not write to it. Adapters are merged: the tensors are the weights of an
    equivalent model without adapters.

    Args:
        bucket_bytes: largest size of a bucket, whose parameters are gathered together. A larger parameter has its own
            bucket. Two buckets are in memory at a time.

    Yields:
        (name, tensor in the model's dtype on `policy.groups.device`). Tied embeddings are yielded once.
    """
    gather_weights(policy)
    groups, bridge = policy.groups, policy.bridge
    local = {name: p for model in policy.gpt_models for name, p in _named_parameters(policy, model)}
    own = [record_of(groups.pp_rank, name, parameter) for name, parameter in local.items()]
    records = [
        record
        for of_stage in all_gather_object(own, groups.pp_group)
        for record in of_stage
        if not (record.name == _OUTPUT and policy.tied_embeddings)
    ]
    shards: Mapping[str, torch.Tensor] = local
    if policy.adapters is not None and not policy.is_base:
        shards = _MergedWeights(local, policy.adapters)
    for record, parts in gather_ahead(policy, records, shards, bucket_bytes=bucket_bytes):
        named = _named_parts(policy, record, parts)
        del parts
        while named:
            name, full = named.pop(0)
            names, tensors = bridge._weight_to_hf_format(name, full)
            del full
            while tensors:
                yield names.pop(0), tensors.pop(0)


def _named_parts(
    policy: Policy, record: ParameterRecord, parts: list[torch.Tensor]
) -> list[tuple[str, torch.Tensor]]:
    """Return (name, whole parameter) pairs: one for each part if the parts are experts, and otherwise only one."""
    groups, config = policy.groups, policy.transformer_config
    if is_expert(record.name):
        assert config.num_moe_experts is not None
        per_rank = config.num_moe_experts // groups.ep_size
        names = expert_names(record.name, experts_per_rank=per_rank, num_ranks=groups.ep_size)
        return list(zip(names, parts, strict=True))
    if len(parts) == 1:
        return [(record.name, parts[0])]
    # mbridge takes the split dimension from a parameter's attributes, so pass a tensor with these attributes.
    shard_info = torch.empty(0)
    shard_info.tensor_model_parallel, shard_info.partition_dim = True, record.split_dim  # type: ignore[attr-defined]
    return [(record.name, policy.bridge._weight_merge_across_tp(record.name, parts, shard_info))]


def save_hf(
    policy: Policy,
    out_dir: str,
    tokenizer_from: str | None = None,
    *,
    chat_template: str = "",
    records: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write weights, config.json, tokenizer and adapters to `out_dir`. Every rank must call this.

    An existing `out_dir` is replaced. `out_dir` is never incomplete, because rank 0 writes to a temporary folder and
    renames it at the end. The weights keep the training dtype. They include the adapters, which are also written on
    their own to the subfolder `ADAPTER_FOLDER`.

    Args:
        tokenizer_from: folder whose tokenizer files are copied. None: the policy's checkpoint.
        chat_template: file with a chat template that replaces the tokenizer's template (`data.chat_template`).
        records: other JSON files to write, as a map from file name to content.

    Raises:
        RuntimeError: on every rank, if rank 0 could not write.
    """
    out, failure = Path(out_dir), None
    files = adapter_files(policy)
    weights = iterate_hf_weights(policy)
    if policy.groups.rank == 0:
        try:
            with atomic_folder(out) as folder:
                _write_weights(weights, folder)
                _write_companions(policy, Path(tokenizer_from or policy.path), folder, chat_template)
                for name, content in records.items():
                    write_json(folder / name, content)
                for name, data in files.items():
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_bytes(data)
        except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors
            failure = f"could not write {out}: {first_line(error)}"
    for _ in weights:  # all ranks take part in the gathers, even rank 0 after a failure
        pass
    failure = broadcast_object(failure, world_group(), source=0)
    if failure is not None:
        raise RuntimeError(failure)


def _write_weights(weights: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write safetensors files, and an index if there are several. Memory holds only one file's tensors at a time."""
    files: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()

    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > MAX_FILE_BYTES:
            flush()
            pending_bytes = 0
        # Copy the tensor, because the next tensor may reuse its memory.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += size
        total_bytes += size
    flush()

    count = len(files)
    weight_map = {}
    for i, names in enumerate(files):
        final = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        (folder / f"part-{i}.safetensors").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    if count > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write_companions(policy: Policy, tokenizer_folder: Path, folder: Path, chat_template: str) -> None:
    config = json.loads((Path(policy.path) / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # an older name of dtype
    config["dtype"] = str(policy.dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    if chat_template:
        shutil.copyfile(chat_template, folder / TEMPLATE_FILE)
    for pattern in (*_COMPANIONS, *(() if chat_template else _TEMPLATES)):
        for file in tokenizer_folder.glob(pattern):
            if file.is_dir():
                shutil.copytree(file, folder / file.name)
            else:
                shutil.copy2(file, folder / file.name)
