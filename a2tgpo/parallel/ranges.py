"""Turn on Megatron's NVTX ranges, which name Megatron's layers and pipeline schedule in Nsight Systems."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.utils import configure_nvtx_profiling


@contextmanager
def megatron_ranges() -> Iterator[None]:
    """Turn on Megatron's NVTX ranges in the `with` block, which must not begin or end inside a range."""
    configure_nvtx_profiling(True)
    try:
        yield
    finally:
        configure_nvtx_profiling(False)
