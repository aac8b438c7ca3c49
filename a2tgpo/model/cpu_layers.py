"""Plain PyTorch twins of Transformer Engine's modules, with the same module tree, parameter names and layouts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn.parameter import Parameter

from a2tgpo.batch.context_split import context_positions
from a2tgpo.model.cpu_experts import grouped_mlp_modules
from a2tgpo.model.plain_attention import attend


class CpuSpecProvider(LocalSpecProvider):
    """Provider of the CPU twins, used in place of `TESpecProvider`."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return PackedAttention

    def grouped_mlp_modules(self, *_: Any) -> Any:
        return grouped_mlp_modules()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / rms(x) * weight over the last dimension, computed in float32 and returned in x's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _norm_weight(config: TransformerConfig, size: int) -> Parameter:
    assert config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
    weight = Parameter(torch.ones(size, dtype=config.params_dtype))
    # With sequence parallelism each tensor-parallel rank sees only a part of the sequence. If this attribute is set,
    # Megatron sums the gradient over these ranks (megatron/core/distributed/finalize_model_grads.py:354).
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(torch.nn.Module):
    """Twin of TENorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_weight(config, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """Twin of TELayerNormColumnParallelLinear, with parameters layer_norm_weight, weight and optionally bias."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _norm_weight(config, input_size)
        self.layer_norm_eps = config.layernorm_epsilon

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(rms_norm(input_, self.layer_norm_weight, self.layer_norm_eps), *args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Return this rank's part of a checkpoint. The norm weight is whole on every rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups: dict[str, Any] = {}
        # Megatron-Core 0.17 and later require the process groups as arguments.
        if "dp_cp_group" in inspect.signature(make_sharded_tensors_for_checkpoint).parameters:
            from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

            metadata = ensure_metadata_has_dp_cp_group(metadata)
            groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0, "bias": 0}, sharded_offsets, **groups
        )


class PackedAttention(MegatronModule):
    """Twin of TEDotProductAttention that computes causal attention inside each segment of a packed row."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert not config.attention_dropout and not attention_dropout
        assert config.context_parallel_size == 1 or pg_collection is not None
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return the result of attention, [tokens, heads * head_dim].

        The query has shape [tokens, heads, head_dim]. Key and value have shape [tokens, kv_heads, head_dim]. The
        segments in `packed_seq_params.cu_seqlens_q` must cover the tokens of all context-parallel ranks.
        """
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd", (
            "sequences must be packed"
        )
        cu_seqlens = packed_seq_params.cu_seqlens_q
        lengths = own_lengths = cu_seqlens.diff().tolist()
        masks: list[torch.Tensor | None] = [None] * len(lengths)
        if self.cp_group is not None:
            positions = context_positions(cu_seqlens, self.cp_group.size())
            key, value = (self._gather(tensor, positions) for tensor in (key, value))
            own_lengths = [length // self.cp_group.size() for length in lengths]
            masks = _causal_masks(positions[self.cp_group.rank()], cu_seqlens, own_lengths)
        segments = zip(query.split(own_lengths), key.split(lengths), value.split(lengths), masks, strict=True)
        outputs = [attend(*segment, self.softmax_scale) for segment in segments if segment[0].size(0)]
        return torch.cat(outputs).flatten(1)

    def _gather(self, own: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Gather [T / cp, ...] to [T, ...] in the row's order. The backward pass sums gradients over the ranks."""
        by_rank = gather_from_sequence_parallel_region(own, group=self.cp_group)
        return by_rank[positions.flatten().argsort()]


def _causal_masks(
    own_positions: torch.Tensor, cu_seqlens: torch.Tensor, own_lengths: list[int]
) -> list[torch.Tensor | None]:
    """Return a bool mask [this rank's tokens, all tokens] for each segment. True: the query attends to the key."""
    ends = zip(own_positions.split(own_lengths), cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False)
    return [own[:, None] >= torch.arange(start, stop) for own, start, stop in ends]
