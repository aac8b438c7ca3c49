"""Replace torch.cuda, NCCL and Triton for Transformer Engine on a CPU. The replacements behave like a Hopper GPU.

a2tgpo/parallel/cpu.py gives Megatron's modules a view of torch. This module gives a view of torch with a GPU to
Transformer Engine's modules, and to the one module of the project that looks for a GPU.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from a2tgpo.parallel.cpu import CudaView, ImportHook, TorchView


def install() -> None:
    view = TorchView(_HopperView())
    view.distributed = _GlooView()  # type: ignore[assignment]
    sys.meta_path.insert(0, ImportHook("transformer_engine", view, {_DISTRIBUTED: _cpu_generator}))
    _see_tensors_on_the_card()
    _interpret_first_configuration()
    from a2tgpo.model import precision

    precision.torch = view  # type: ignore[attr-defined]


class _HopperView(CudaView):
    """A view of `torch.cuda` with one Hopper GPU, whose memory is the CPU's."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def get_device_capability(device: Any = None) -> tuple[int, int]:
        return (9, 0)

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return False


def _see_tensors_on_the_card() -> None:
    """Let `is_cuda` be True in Transformer Engine's code, and let `to("cuda")` return the same tensor."""
    is_cuda, to = torch.Tensor.is_cuda.__get__, torch.Tensor.to  # type: ignore[attr-defined]

    def on_card(tensor: torch.Tensor) -> bool:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        return asker.startswith("transformer_engine.") or is_cuda(tensor)

    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = tensor.device
        return to(tensor, *args, **kwargs)

    torch.Tensor.is_cuda = property(on_card)  # type: ignore[assignment]
    torch.Tensor.to = moved  # type: ignore[assignment, method-assign]


# -- gloo in the place of NCCL -------------------------------------------------------------------------------


class _GlooView(types.ModuleType):
    """A view of `torch.distributed` in which gloo replaces NCCL."""

    def __init__(self) -> None:
        super().__init__("torch.distributed")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    @staticmethod
    def batch_isend_irecv(operations: list[Any]) -> list[Any]:
        return [_WaitedForOnce(work) for work in torch.distributed.batch_isend_irecv(operations)]

    @staticmethod
    @contextlib.contextmanager
    def _coalescing_manager(*_: Any, **__: Any) -> Iterator[Any]:
        """gloo cannot coalesce collectives, so each collective runs at once."""
        yield types.SimpleNamespace(wait=lambda: True)


class _WaitedForOnce:
    """A request for which a second wait does nothing. The backward ring waits twice, which NCCL allows, but which
    makes gloo hang.
    """

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> bool:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return True


# -- single modules ------------------------------------------------------------------------------------------

_DISTRIBUTED = "transformer_engine.pytorch.distributed"


def _cpu_generator(distributed: Any) -> None:
    """Let recomputation under FP8 keep the random state of the CPU's generator."""
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _interpret_first_configuration() -> None:
    """Take the first configuration of each kernel, because Triton's interpreter cannot time configurations."""
    from triton.runtime.autotuner import Autotuner

    def run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        return tuner.fn.run(*args, **kwargs, **tuner.prune_configs(kwargs)[0].all_kwargs())

    Autotuner.run = run
