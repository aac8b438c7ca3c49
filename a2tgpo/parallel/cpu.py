"""Adapt Megatron-Core to a machine without a GPU. On a machine with a GPU, do nothing.

Megatron's code contains `torch.cuda.current_device()` and `device="cuda"`. `install()` registers an import hook that
gives every module of `megatron.core` a view of `torch` in which these expressions mean the CPU. In torch itself, only
`Tensor.cuda` and `Tensor.type` change, because a view cannot replace methods of tensors. Each adaptation runs when
the Megatron module that it changes is imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

SCOPE = "megatron.core"
KEPT_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
"""Environment variable and value that limit oneDNN's cache to 64 compiled kernels.

Each number of tokens needs its own kernels. oneDNN's default cache of 1,024 kernels takes 0.25 GiB and is full within
ten steps. From then on, kernels are replaced one by one, which fragments the heap. Recompiling a kernel takes 0.3 ms.
"""

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)

_EXPECTED_WARNINGS = (
    "Apex is not installed|Transformer Engine and Apex are not installed|full scope is deprecated"
    "|If you are using transformer_engine"
)
"""Megatron's warnings about GPU libraries that are absent on purpose, and about Megatron's own defaults. They are
ignored."""


def install() -> None:
    """Adapt Megatron-Core to the CPU. On a machine with a GPU, or in a second call, do nothing.

    Raises:
        RuntimeError: if megatron has already been imported, because its modules then keep their references to torch.
    """
    if torch.cuda.is_available() or any(isinstance(finder, ImportHook) for finder in sys.meta_path):
        return
    if SCOPE in sys.modules:
        raise RuntimeError("megatron.core was imported before a2tgpo.parallel; import a2tgpo.parallel first")
    os.environ.setdefault(*KEPT_KERNELS)  # oneDNN reads the variable when it compiles the first kernel
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
    torch.Tensor.type = _type_with_device_alias(torch.Tensor.type)  # type: ignore[method-assign]
    warnings.filterwarnings("ignore", message=_EXPECTED_WARNINGS, category=UserWarning)
    sys.meta_path.insert(0, ImportHook(SCOPE, TorchView(CudaView()), _ADAPTATIONS))


class ImportHook:
    """Import hook for the modules of the package `scope`.

    After the import of a module, the hook replaces the module's `torch` by `torch_view`. If `adaptations` has a
    function for the module, the hook then calls this function.
    """

    def __init__(
        self, scope: str, torch_view: types.ModuleType, adaptations: dict[str, Callable[[Any], None]]
    ) -> None:
        self.scope, self.torch_view, self.adaptations = scope, torch_view, adaptations

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.scope and not name.startswith(self.scope + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self._exec_module, loader.exec_module)
        return spec

    def _exec_module(self, exec_module: Callable[[types.ModuleType], None], module: types.ModuleType) -> None:
        exec_module(module)
        if module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = self.torch_view
        adapt = self.adaptations.get(module.__name__)
        if adapt is not None:
            adapt(module)


class TorchView(types.ModuleType):
    """View of `torch` that creates a tensor on the CPU if Megatron requests it on a CUDA device."""

    def __init__(self, cuda: types.ModuleType) -> None:
        super().__init__("torch")
        self.cuda = cuda
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class _NoStream:
    """Stand-in for a CUDA stream or event. Its methods do nothing, because the CPU works synchronously."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> _NoStream:
        return event or _NoStream()

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class CudaView(types.ModuleType):
    """View of `torch.cuda` whose only device is the CPU. Other attributes are those of the real `torch.cuda`."""

    Stream = _NoStream
    Event = _NoStream

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.nvtx = types.SimpleNamespace(range_push=_nothing, range_pop=_nothing)
        self.synchronize = self.empty_cache = self.set_device = self.set_stream = _nothing

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def current_stream(device: Any = None) -> _NoStream:
        return _NoStream()

    default_stream = current_stream

    @staticmethod
    def stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    @staticmethod
    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _TypeName(str):
    """A string such as 'torch.FloatTensor' that also compares equal to the GPU's name, 'torch.cuda.FloatTensor'.

    Megatron's optimizers group parameters by comparing `param.type()` with 'torch.cuda.FloatTensor'
    (megatron/core/optimizer/distrib_optimizer.py:361, optimizer.py:671, clip_grads.py:167).
    """

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or self.replace("torch.", "torch.cuda.", 1) == str(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _type_with_device_alias(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(tensor_type)
    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(tensor, *args, **kwargs)
        return _TypeName(result) if isinstance(result, str) else result

    return type_


def _without_compilation(jit: Any) -> None:
    # Compiling small CPU kernels costs more time than it saves.
    jit.disable_jit_fuser()


def _cpu_generator(random: Any) -> None:
    """Make Megatron save and restore the state of the CPU generator in place of the GPU generator."""
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    # Megatron's fork() warns if the CPU's random state changes, but here this change is intended.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _fused_adam(optimizer: Any) -> None:
    from a2tgpo.parallel.cpu_adam import CpuFusedAdam

    optimizer.Adam = CpuFusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False


def _fused_adam_sharded(distrib_optimizer: Any) -> None:
    from a2tgpo.parallel.cpu_adam import CpuFusedAdam

    distrib_optimizer.Adam = CpuFusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def _without_copies(param_and_grad_buffer: Any) -> None:
    from a2tgpo.parallel.cpu_collectives import all_gather, reduce_scatter

    param_and_grad_buffer.dist_reduce_scatter_func = reduce_scatter
    param_and_grad_buffer.dist_all_gather_func = all_gather


def _plain_splits(moe_utils: Any) -> None:
    """Make the experts' token dispatcher pass the splits of its all-to-all as NumPy arrays, as it does on a GPU.

    On a CPU the dispatcher would pass tensors, which torch rejects.
    """
    move = moe_utils.maybe_move_tensor_to_cpu

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = move(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and isinstance(moved, torch.Tensor) else moved

    moe_utils.maybe_move_tensor_to_cpu = to_cpu


_ADAPTATIONS: dict[str, Callable[[Any], None]] = {
    "megatron.core.jit": _without_compilation,
    "megatron.core.tensor_parallel.random": _cpu_generator,
    "megatron.core.distributed.param_and_grad_buffer": _without_copies,
    "megatron.core.optimizer": _fused_adam,
    "megatron.core.optimizer.distrib_optimizer": _fused_adam_sharded,
    "megatron.core.transformer.moe.moe_utils": _plain_splits,
}
