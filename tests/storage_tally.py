"""Count the memory that tensor operations allocate."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageTally(TorchDispatchMode):
    """Counts the bytes of storages that operations create in the `with` block, and the bytes that exist at once.

    It may be entered several times. Memory that an operation allocates and frees internally is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0
        self.peak_bytes = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        given = {storage_of(tensor) for tensor in tree_iter((args, kwargs)) if is_tensor(tensor)}
        for tensor in tree_iter(result):
            if is_tensor(tensor) and storage_of(tensor) not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        reference, size = StorageWeakRef(storage), storage.nbytes()
        self._alive = [(known, held) for known, held in self._alive if not known.expired()]
        if all(known.cdata != reference.cdata for known, _ in self._alive):
            self._alive.append((reference, size))
        self.largest_bytes = max(self.largest_bytes, size)
        self.peak_bytes = max(self.peak_bytes, sum(held for _, held in self._alive))


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
