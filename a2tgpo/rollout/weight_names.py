"""Find the names and shapes of the weights that an engine expects, and check that it gets exactly these weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from a2tgpo.data.weight_files import weight_shapes

if TYPE_CHECKING:
    import torch

OUTPUT_HEAD = "lm_head.weight"


def checkpoint_shapes(model_path: str, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight in a Hugging Face folder, by name. A tied output head is left out."""
    # Old checkpoints contain rotary tables, which the engine computes itself.
    return {
        name: shape
        for name, shape in weight_shapes(model_path).items()
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == OUTPUT_HEAD)
    }


def checked_weights(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `weights`, and check that each name is known, occurs exactly once and has the right shape.

    If a weight were missing, the engine would only log a warning and keep the old value.

    Raises:
        RuntimeError: with a one-line message, if a name is unknown, duplicate or missing, or if a shape is wrong.
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
