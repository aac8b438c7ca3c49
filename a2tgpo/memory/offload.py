"""Move tensors off the GPU, and later back to the same storages, with exactly the same bits.

Offloading frees the memory of a storage but keeps its tensors, because parameters, gradients and the optimizer's
shards are views of Megatron's buffers. On a CPU, storages are emptied and refilled in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from a2tgpo.model.policy import Policy

PAGE_BYTES = 2**28
"""Host memory is allocated in pieces of this size. torch rounds the size of a piece up to a power of two."""


class MovablePart:
    """A set of tensors that are either all on the GPU or all off the GPU.

    Between `leave` and `come_back` the tensors have no memory and must not be used.

    Args:
        tensors: a function that returns the current tensors, which may share storages.
        keeps_values: whether the values are copied to the host and back. If False, the tensors come back as zeros.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, keeps_values: bool = True) -> None:
        self._tensors = tensors
        self._keeps_values = keeps_values
        self._away: dict[int, int] = {}  # address of each storage that has left -> its number of bytes
        self._host: _HostPages | None = None

    def bytes_on_card(self) -> int:
        return sum(storage.nbytes() for storage in self._storages())

    def is_resident(self) -> bool:
        """Return whether all storages are on the GPU."""
        return all(storage.nbytes() > 0 for storage in self._storages())

    def is_away(self) -> bool:
        """Return whether all storages are off the GPU."""
        return self.bytes_on_card() == 0

    def leave(self) -> int:
        """Free the GPU memory and return the number of bytes copied to the host."""
        storages = self._storages()
        self._away = {storage._cdata: storage.nbytes() for storage in storages}
        copied = self._copy(storages, to_host=True) if self._keeps_values else 0
        for storage in storages:
            storage.resize_(0)
        return copied

    def come_back(self) -> int:
        """Allocate the GPU memory again and return the number of bytes copied from the host."""
        storages = self._storages()
        assert self._away.keys() == {storage._cdata for storage in storages}, "tensors changed while away"
        for storage in storages:
            storage.resize_(self._away[storage._cdata])
        self._away = {}
        if self._keeps_values:
            return self._copy(storages, to_host=False)
        for storage in storages:
            _bytes_of(storage).zero_()
        return 0

    def _copy(self, storages: list[UntypedStorage], *, to_host: bool) -> int:
        total = sum(storage.nbytes() for storage in storages)
        is_gpu = any(storage.device.type == "cuda" for storage in storages)
        if self._host is None or self._host.num_bytes < total:
            self._host = None  # free the old pages before allocating more
            self._host = _HostPages(total, page_locked=is_gpu)
        start = 0
        for storage in storages:
            for on_card, on_host in self._host.beside(_bytes_of(storage), start):
                source, target = (on_card, on_host) if to_host else (on_host, on_card)
                target.copy_(source, non_blocking=True)
            start += storage.nbytes()
        if is_gpu:
            torch.cuda.synchronize()
        elif not to_host:
            self._host = None  # only page-locked memory is worth keeping, because it is slow to allocate
        return total

    def _storages(self) -> list[UntypedStorage]:
        """Return the distinct storages of all non-empty tensors."""
        found = {}
        for tensor in self._tensors():
            if tensor.numel():
                storage = tensor.untyped_storage()
                found[storage._cdata] = storage
        return list(found.values())


class HostCopy:
    """A copy of contiguous tensors in host memory. The memory is allocated once and used again.

    On a GPU the memory is page-locked, and copies are ordered with the other work of the current stream. The tensors
    of every call must have the same sizes in the same order.
    """

    def __init__(self) -> None:
        self._pages: _HostPages | None = None

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copy the values of `tensors` to the host."""
        size = sum(tensor.nbytes for tensor in tensors)
        if self._pages is None or self._pages.num_bytes != size:
            self._pages = None  # free the old pages before allocating more
            self._pages = _HostPages(size, page_locked=any(tensor.is_cuda for tensor in tensors))
        for _, piece, copy in self.pieces(tensors):
            copy.copy_(piece, non_blocking=True)

    def put_back(self, tensors: Sequence[Tensor]) -> None:
        """Give `tensors` the values that the last `take` copied."""
        for _, piece, copy in self.pieces(tensors):
            piece.copy_(copy, non_blocking=True)

    def pieces(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (index of the tensor, piece of the tensor, copy of the piece); pieces are flat views."""
        assert self._pages is not None, "take comes first"
        start = 0
        for index, tensor in enumerate(tensors):
            flat = tensor.detach().view(-1).view(torch.uint8)
            for piece, copy in self._pages.beside(flat, start):
                yield index, piece.view(tensor.dtype), copy.view(tensor.dtype)
            start += tensor.nbytes


class _HostPages:
    def __init__(self, num_bytes: int, *, page_locked: bool) -> None:
        sizes = [min(PAGE_BYTES, num_bytes - start) for start in range(0, num_bytes, PAGE_BYTES)]
        self.num_bytes = num_bytes
        self._pages = [torch.empty(size, dtype=torch.uint8, pin_memory=page_locked) for size in sizes]

    def beside(self, on_card: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each piece of `on_card` [bytes] with its place in the pages. The places begin at byte `start`."""
        done = 0
        while done < on_card.numel():
            page, offset = divmod(start + done, PAGE_BYTES)
            place = self._pages[page][offset : offset + on_card.numel() - done]
            yield on_card[done : done + place.numel()], place
            done += place.numel()


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def weight_tensors(policy: Policy) -> list[Tensor]:
    return [parameter.data for chunk in policy.chunks for parameter in chunk.parameters()]


def gradient_tensors(policy: Policy) -> list[Tensor]:
    """Return Megatron's gradient buffers. A model that is not trained has none."""
    wrapped = policy.wrapped_chunks
    return [
        buffer.grad_data for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]


def optimizer_tensors(policy: Policy, optimizer: Any) -> list[Tensor]:
    """Return Adam's moments, and the optimizer's float32 weights unless the model itself stores them."""
    of_model = {tensor.untyped_storage()._cdata for tensor in weight_tensors(policy)}
    stepped = [tensor.data for group in adam_groups(optimizer) for tensor in group["params"]]
    return [t for t in (*stepped, *moment_tensors(optimizer)) if t.untyped_storage()._cdata not in of_model]


def moment_tensors(optimizer: Any) -> list[Tensor]:
    """Return Adam's moments, which exist after the first update."""
    return [
        value
        for adam in _adams(optimizer)
        for state in adam.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def adam_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Return Adam's parameter groups. Their `params` are the float32 weights that Adam updates, or this rank's shards
    of these weights."""
    return [group for adam in _adams(optimizer) for group in adam.param_groups]


def _adams(optimizer: Any) -> list[Any]:
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
