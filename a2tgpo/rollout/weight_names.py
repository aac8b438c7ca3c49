"""The weights that an engine expects, and the check that it receives exactly those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from a2tgpo.data.weight_files import weight_shapes

if TYPE_CHECKING:
    import torch

OUTPUT_HEAD = "lm_head.weight"


def checkpoint_shapes(model_path: str, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight in a Hugging Face folder by name, from the safetensors headers.

    Args:
        model_path: the folder.
        tied: whether the output head shares the embedding's weight; the head is then left out.
    """
    # Old checkpoints store rotary tables, which the engine computes.
    return {
        name: shape
        for name, shape in weight_shapes(model_path).items()
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == OUTPUT_HEAD)
    }


def checked_weights(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `weights`, checking that each name is known, occurs exactly once and has the right shape.

    The engine itself only warns about a missing weight and keeps the old value.

    Raises:
        RuntimeError: one line; an unknown, duplicate or missing name, or a wrong shape.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if tied and name == OUTPUT_HEAD:
            continue
        if name not in shapes:
            raise RuntimeError(f"refit: the engine has no weight {name}; the export does not fit model.path")
        if name in seen:
            raise RuntimeError(f"refit: weight {name} was handed over twice")
        if tuple(tensor.shape) != shapes[name]:
            raise RuntimeError(f"refit: weight {name} is {list(tensor.shape)}; expected {list(shapes[name])}")
        seen.add(name)
        yield name, tensor
    missing = sorted(shapes.keys() - seen)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RuntimeError(f"refit: the export lacks {', '.join(missing[:3])}{more}")
