"""Low-rank adapters (LoRA, arXiv 2106.09685) on Megatron's linear layers.

An adapter adds alpha / rank * x A^T B^T to the output of a layer, whose own weight W is frozen. A Megatron layer may
join several projections of the Hugging Face model. Each projection has its own A and B, as in PEFT. The weight that
the engine gets is W + alpha / rank * B A, with the rows in Megatron's order.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from transformers import PretrainedConfig

from a2tgpo.config.lora import LoraConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.experts import has_experts
from a2tgpo.parallel.groups import ParallelGroups

_SUFFIX = "_lora"
"""An adapter is the attribute LAYER_lora of the module that has the linear layer LAYER. The linear layer's own state
dict then stays as it is."""


class Projection(NamedTuple):
    """A projection of the Hugging Face model, as a part of a linear layer of Megatron."""

    name: str
    """Name in the Hugging Face model, for example `model.layers.0.self_attn.q_proj`."""
    width: int
    """Number of the projection's outputs on this rank."""
    is_adapted: bool

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


class LoraAdapter(nn.Module, ABC):
    """The adapters of one linear layer: parameters A_NAME [rank, inputs] and B_NAME [outputs, rank] by projection.

    B is 0 at first. As in PEFT, A is at first uniform in [-1 / sqrt(inputs), 1 / sqrt(inputs)]. Its values depend
    only on the projection's name, so they are the same in every layout.

    Args:
        linear: the layer. `attach_adapters` makes it use the adapter.
        projections: the projections that the layer joins.
    """

    def __init__(
        self,
        linear: Any,
        projections: Sequence[Projection],
        *,
        lora: LoraConfig,
        config: TransformerConfig,
        groups: ParallelGroups,
    ) -> None:
        super().__init__()
        self.projections = [projection for projection in projections if projection.is_adapted]
        self._all_projections = projections
        self._scale = lora.scale
        self._groups = groups
        self._sequence_parallel = config.sequence_parallel
        self._device, self._dtype = linear.weight.device, config.params_dtype

    def pair(self, projection: Projection) -> tuple[Parameter, Parameter]:
        """Return this rank's parts of a projection's A and B."""
        return getattr(self, f"A_{projection.leaf}"), getattr(self, f"B_{projection.leaf}")

    @abstractmethod
    def delta(self) -> Tensor:
        """Return alpha / rank * B A for this rank's part of the layer's weight, float32."""

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return `weight`, this rank's part of the layer's weight, plus `delta`: added in float32, rounded once."""
        return self.delta().add_(weight).to(weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Return this rank's part of a checkpoint, for Megatron's distributed checkpoints."""
        assert metadata is not None, "the metadata name the process groups"
        state = self.state_dict(prefix="", keep_vars=True)
        split = {name: p.partition_dim for name, p in state.items() if p.tensor_model_parallel}
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            split,
            sharded_offsets,
            tp_group=self._groups.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def _add_parameter(self, name: str, value: Tensor, *, split_dim: int | None) -> None:
        parameter = Parameter(value.to(self._device, self._dtype).contiguous())
        if split_dim is None:
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            # Each tensor-parallel rank computes the gradient from its own part of the sequence. If this attribute is
            # set, Megatron sums the gradient over these ranks (megatron/core/distributed/finalize_model_grads.py).
            parameter.sequence_parallel = self._sequence_parallel  # type: ignore[attr-defined]
        else:
            set_tensor_model_parallel_attributes(parameter, True, split_dim, 1)
        parameter.allreduce = True  # type: ignore[attr-defined]
        # Megatron gathers a module's own parameters just before the module runs, but not the parameters of submodules
        # that are not called. So A and B belong to this module itself.
        self.register_parameter(name, parameter)


class ColumnAdapter(LoraAdapter):
    """Adapters of a layer whose outputs are split over the tensor-parallel ranks. Each rank has all of A and its own
    rows of B.

    Args:
        num_blocks: number of equal blocks in the layer's outputs on this rank. Each block has a part of every
            projection, in order. The layer that joins queries, keys and values has a block for each key-value head.
    """

    def __init__(
        self,
        linear: Any,
        projections: Sequence[Projection],
        *,
        num_blocks: int,
        lora: LoraConfig,
        **place: Any,
    ) -> None:
        super().__init__(linear, projections, lora=lora, **place)
        self._num_blocks = num_blocks
        rows, inputs = linear.weight.shape
        assert rows == sum(projection.width for projection in projections), "the projections form the layer"
        for projection in self.projections:
            first = _initial(projection.name, lora.rank, inputs)
            self._add_parameter(f"A_{projection.leaf}", first, split_dim=None)
            self._add_parameter(f"B_{projection.leaf}", torch.zeros(projection.width, lora.rank), split_dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """Return [T, ..., own outputs] for x [T, ..., inputs]. With sequence parallelism, x has only T / tp rows."""
        first = torch.cat([self.pair(projection)[0] for projection in self.projections])
        low = self._scale * F.linear(x, first)  # [T or T / tp, ..., rank * projections]
        if self._groups.tp_size > 1:
            # Gather here, where the rows are short.
            low = (
                gather_from_sequence_parallel_region(low, group=self._groups.tp_group)
                if self._sequence_parallel
                else copy_to_tensor_model_parallel_region(low, group=self._groups.tp_group)
            )
        parts = iter(low.chunk(len(self.projections), dim=-1))
        outputs = [
            F.linear(next(parts), self.pair(projection)[1])
            if projection.is_adapted
            else low.new_zeros(*low.shape[:-1], projection.width)
            for projection in self._all_projections
        ]
        return self._join(outputs, dim=-1)

    def delta(self) -> Tensor:
        inputs = self.pair(self.projections[0])[0].size(1)
        products = []
        for projection in self._all_projections:
            if projection.is_adapted:
                first, second = self.pair(projection)
                products.append((self._scale * second.float()) @ first.float())
            else:
                products.append(torch.zeros(projection.width, inputs, device=self._device))
        return self._join(products, dim=0)

    def _join(self, parts: Sequence[Tensor], *, dim: int) -> Tensor:
        """Join the projections' outputs along `dim` in the layer's order."""
        dim %= parts[0].dim()
        blocks = [part.unflatten(dim, (self._num_blocks, -1)) for part in parts]
        return torch.cat(blocks, dim=dim + 1).flatten(dim, dim + 1)


class RowAdapter(LoraAdapter):
    """The adapter of a layer whose inputs are split over the tensor-parallel ranks. Each rank has its own columns of
    A and all of B."""

    def __init__(self, linear: Any, projection: Projection, *, lora: LoraConfig, **place: Any) -> None:
        super().__init__(linear, [projection], lora=lora, **place)
        outputs, own = linear.weight.shape
        size, rank = self._groups.tp_size, self._groups.tp_rank
        first = _initial(projection.name, lora.rank, own * size).chunk(size, dim=1)[rank]
        self._add_parameter(f"A_{projection.leaf}", first, split_dim=1)
        self._add_parameter(f"B_{projection.leaf}", torch.zeros(outputs, lora.rank), split_dim=None)

    def forward(self, x: Tensor) -> Tensor:
        """Return [T, ..., outputs] for x [T, ..., own inputs]. With sequence parallelism, the result has only T / tp
        rows."""
        first, second = self.pair(self.projections[0])
        low = self._scale * F.linear(x, first)  # this rank's term of the sum over ranks, [T, ..., rank]
        if self._groups.tp_size > 1:
            low = (
                reduce_scatter_to_sequence_parallel_region(low, group=self._groups.tp_group)
                if self._sequence_parallel
                else reduce_from_tensor_model_parallel_region(low, group=self._groups.tp_group)
            )
        return F.linear(low, second)

    def delta(self) -> Tensor:
        first, second = self.pair(self.projections[0])
        return (self._scale * second.float()) @ first.float()


@dataclass
class Adapters:
    """All adapters of this rank's part of a model."""

    config: LoraConfig
    targets: tuple[str, ...]
    """The projections of the model that have adapters."""
    by_weight: dict[str, LoraAdapter] = field(default_factory=dict)
    """Maps the global Megatron name of each adapted weight to its adapter."""
    are_on: bool = True
    """Whether the layers add the adapters' outputs to their own."""

    @contextlib.contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Run the passes inside this context with the adapters on or off."""
        before, self.are_on = self.are_on, on
        try:
            yield
        finally:
            self.are_on = before


def is_adapter(name: str) -> bool:
    """Return whether the Megatron parameter `name` belongs to an adapter."""
    return f"{_SUFFIX}." in name


def attach_adapters(
    models: Sequence[GPTModel],
    lora: LoraConfig,
    hf_config: PretrainedConfig,
    config: TransformerConfig,
    groups: ParallelGroups,
) -> Adapters:
    """Freeze the weights of this rank's `models`, and add trainable adapters to their layers.

    Raises:
        ConfigError: if the model has none of the targets.
    """
    adapters = Adapters(lora, lora.targets_of(has_experts=has_experts(hf_config)))
    if not adapters.targets:
        raise ConfigError(
            f"model.lora.targets is {list(lora.targets)}; allowed: also attention projections, since a "
            f"{hf_config.model_type} model has its feed-forward projections in experts, which get no adapters"
        )
    place = {"lora": lora, "config": config, "groups": groups}
    for model in models:
        model.requires_grad_(False)
        if model.pre_process:
            model.embedding.register_forward_hook(_require_gradient)
        for layer in model.decoder.layers:
            for parent, owner, name, adapter in _layer_adapters(layer, hf_config, adapters.targets, place):
                setattr(owner, name + _SUFFIX, adapter)
                linear = getattr(owner, name)
                norm = _Norm(getattr(linear, "layer_norm_weight", None), config.layernorm_epsilon)
                linear.register_forward_hook(_Addition(adapters, adapter, norm))
                number = layer.layer_number - 1  # the layer's index in the whole model
                adapters.by_weight[f"decoder.layers.{number}.{parent}.{name}.weight"] = adapter
    return adapters


def _layer_adapters(
    layer: Any, hf_config: PretrainedConfig, targets: Sequence[str], place: dict[str, Any]
) -> Iterator[tuple[str, Any, str, LoraAdapter]]:
    """Yield (module's name in the layer, module, name of its linear layer, adapter) for each adapted linear layer."""
    tp_size, prefix = place["groups"].tp_size, f"model.layers.{layer.layer_number - 1}"

    def projections(part: str, widths: dict[str, int]) -> list[Projection]:
        return [
            Projection(f"{prefix}.{part}.{name}", width, name in targets) for name, width in widths.items()
        ]

    kv_heads, size = hf_config.num_key_value_heads // tp_size, hf_config.head_dim
    joined = projections(
        "self_attn",
        {
            "q_proj": hf_config.num_attention_heads // tp_size * size,
            "k_proj": kv_heads * size,
            "v_proj": kv_heads * size,
        },
    )
    attention, mlp = layer.self_attention, layer.mlp
    if any(projection.is_adapted for projection in joined):
        adapter = ColumnAdapter(attention.linear_qkv, joined, num_blocks=kv_heads, **place)
        yield "self_attention", attention, "linear_qkv", adapter
    (output,) = projections("self_attn", {"o_proj": hf_config.hidden_size})
    if output.is_adapted:
        yield "self_attention", attention, "linear_proj", RowAdapter(attention.linear_proj, output, **place)
    if has_experts(hf_config):
        return
    width = hf_config.intermediate_size // tp_size
    joined = projections("mlp", {"gate_proj": width, "up_proj": width})
    if any(projection.is_adapted for projection in joined):
        yield "mlp", mlp, "linear_fc1", ColumnAdapter(mlp.linear_fc1, joined, num_blocks=1, **place)
    (down,) = projections("mlp", {"down_proj": hf_config.hidden_size})
    if down.is_adapted:
        yield "mlp", mlp, "linear_fc2", RowAdapter(mlp.linear_fc2, down, **place)


class _Norm(NamedTuple):
    """The norm that is a part of a linear layer. The weight is None if the layer has no norm."""

    weight: Parameter | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.weight is None else F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Addition(NamedTuple):
    """Forward hook of a linear layer that adds the output of its adapter."""

    adapters: Adapters
    adapter: LoraAdapter
    norm: _Norm

    def __call__(self, _layer: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> Any:
        if not self.adapters.are_on:
            return output
        own, bias = output
        return own + self.adapter(self.norm(inputs[0])), bias


def _require_gradient(_embedding: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """Forward hook of a frozen embedding that makes its output require a gradient.

    Otherwise a layer that is computed again in the backward pass would have no input that requires a gradient. torch
    would then not run the layer's backward pass, and its adapters would get no gradients.
    """
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _initial(name: str, rank: int, inputs: int) -> Tensor:
    """Return the initial A of projection `name`, [rank, inputs] float32 on the CPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (2 * torch.rand(rank, inputs, generator=generator) - 1) / math.sqrt(inputs)
