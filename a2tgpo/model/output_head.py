"""Run the output layer only at the positions that need log-probs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn


@contextlib.contextmanager
def output_at(model: GPTModel, rows: Tensor) -> Iterator[None]:
    """Run the output layer of `model` only at `rows` inside this context.

    All tensor-parallel ranks must use the same rows. If the loss does not depend on the logits at other positions,
    the gradients are the same as with the full layer.

    Args:
        rows: [n] int64, n >= 1, on the model's device: indices into the positions that this rank runs.
    """
    layer = model.output_layer
    is_split, reduces = layer.sequence_parallel, layer.allreduce_dgrad

    def at_rows(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        hidden = arguments[0]  # [T, 1, hidden]; [T / tp, 1, hidden] if `is_split`
        if is_split:
            # The layer sums the gradient of its input over the ranks, so the gather must not sum it again.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=layer.tp_group
            )
        return hidden.index_select(0, rows)  # [n, 1, hidden]

    hook = layer.register_forward_pre_hook(at_rows)
    if is_split:
        # The hook gathers the input, so switch off the layer's own all-gather. The backward pass uses the values that
        # these flags have in the forward pass.
        layer.sequence_parallel, layer.allreduce_dgrad = False, True
    try:
        yield
    finally:
        hook.remove()
        layer.sequence_parallel, layer.allreduce_dgrad = is_split, reduces
