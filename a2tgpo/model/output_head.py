"""The output layer at some positions of a row only: nobody asks what follows the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn


@contextlib.contextmanager
def output_at(model: GPTModel, rows: Tensor) -> Iterator[None]:
    """Within, the output layer of `model` runs at `rows` only; afterwards it is as before.

    All tensor-parallel ranks run the model with the same rows. Gradients are those of the full layer where the other
    logits have none.

    Args:
        model: a last pipeline stage's.
        rows: [n] int64, n >= 1, on the model's device: places in the row of positions that this rank runs.
    """
    layer = model.output_layer
    is_split, reduces = layer.sequence_parallel, layer.allreduce_dgrad

    def at_rows(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        hidden = arguments[0]  # [T, 1, hidden], under sequence parallelism / tp
        if is_split:
            # The layer sums its input's gradient over the ranks; each then keeps its own part.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=layer.tp_group
            )
        return hidden.index_select(0, rows)  # [n, 1, hidden]

    hook = layer.register_forward_pre_hook(at_rows)
    if is_split:
        # What it is given is whole already; a backward pass goes by what was set in its forward pass.
        layer.sequence_parallel, layer.allreduce_dgrad = False, True
    try:
        yield
    finally:
        hook.remove()
        layer.sequence_parallel, layer.allreduce_dgrad = is_split, reduces
