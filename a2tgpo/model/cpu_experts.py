"""Plain PyTorch twins of Transformer Engine's grouped linear layers, which hold one weight per expert."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts, moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch.nn.parameter import Parameter

if not hasattr(moe_utils, "te_general_gemm"):
    # The router checks whether this name is None, but Megatron does not define the name if Transformer Engine is
    # missing.
    moe_utils.te_general_gemm = None


def grouped_mlp_modules() -> Any:
    """Return the value of `BackendSpecProvider.grouped_mlp_modules` for experts built from the twins.

    Megatron-Core 0.16, the last version for Python 3.11, expects a class and its parts. Megatron-Core 0.19 expects a
    function that builds the experts.
    """
    if hasattr(experts, "GroupedMLP"):
        return experts.TEGroupedMLP, MLPSubmodules(
            linear_fc1=ColumnGroupedLinear, linear_fc2=RowGroupedLinear
        )
    parts = experts.GroupedMLPSubmodules(
        linear_fc1=ColumnGroupedLinear, linear_fc2=RowGroupedLinear, activation_func=None
    )
    return functools.partial(experts.TEGroupedMLP, submodules=parts)


class GroupedLinear(torch.nn.Module):
    """Twin of TEGroupedLinear, with parameters weight0 ... weightN of shape [output_size, input_size] and no bias."""

    split_dim: int
    """Dimension along which Transformer Engine would split an expert over ranks. Here each expert is whole."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Any,
        bias: bool,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias and pg_collection.expt_tp.size() == 1
        self.num_gemms = num_gemms
        self.groups = pg_collection
        for number in range(num_gemms):
            weight = Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            init_method(weight)
            # Mark the weight as split, as in Transformer Engine, so that every rank adds it to the gradient norm.
            set_tensor_model_parallel_attributes(weight, True, self.split_dim, 1)
            self.register_parameter(f"weight{number}", weight)

    def forward(self, x: torch.Tensor, tokens_per_expert: list[int]) -> tuple[torch.Tensor, None]:
        """Map x [tokens, input_size], sorted by expert, to [tokens, output_size]. An expert may have no tokens."""
        parts = x.split(tokens_per_expert)
        weights = [self.get_parameter(f"weight{number}") for number in range(self.num_gemms)]
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)]), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return this rank's rows of a tensor that has all experts of the layer along its first dimension."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        first, total = self.groups.ep.rank() * self.num_gemms, self.groups.ep.size() * self.num_gemms
        state: dict[str, Any] = {}
        for number in range(self.num_gemms):
            sharded = make_sharded_tensors_for_checkpoint(
                {f"{number}.weight": self.get_parameter(f"weight{number}")},
                "",
                {f"{number}.weight": self.split_dim},
                (*sharded_offsets, (len(sharded_offsets), first + number, total)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(sharded, f"{number}.", prefix)
            tensor = sharded[f"{number}.weight"]
            tensor.replica_id = (*tensor.replica_id[:2], self.groups.expt_dp.rank())
            state[f"{prefix}weight{number}"] = tensor
        return state


class ColumnGroupedLinear(GroupedLinear):
    """Twin of TEColumnParallelGroupedLinear."""

    split_dim = 0


class RowGroupedLinear(GroupedLinear):
    """Twin of TERowParallelGroupedLinear."""

    split_dim = 1
