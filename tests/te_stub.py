"""Stands in for `transformer_engine_torch`, Transformer Engine's compiled part: its modules are built without a GPU.

Nothing can be computed with it: every function raises. What is built is Transformer Engine's own Python code, with
its own parameter names, shapes and dtypes. `install()` must run before anything of megatron is imported.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from pathlib import Path
from typing import Any

FOLDER = Path(sys.prefix) / "transformer-engine"
"""Where `make setup-py312` puts Transformer Engine's wheels, apart from the packages of the environment: beside them
Megatron would find it, and could not be imported without this stub."""


_ENUMERATIONS = {
    "DType": {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
    "NVTE_Fused_Attn_Backend": {"NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2, "NVTE_No_Backend": -1},
}
"""Those that Transformer Engine 2.20 compares with Python enumerations of its own when it is imported."""


class _Numbered(type):
    """A class each of whose attributes is an integer of its own, as the members of an enumeration are."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = len([key for key in vars(cls) if not key.startswith("__")])
        setattr(cls, name, value)
        return value


class _Stub(types.ModuleType):
    """Classes for names that begin with a capital, functions that raise for the others."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = _Numbered(name, (), {}) if name[0].isupper() else functools.partial(_refuse, name)
        setattr(self, name, value)
        return value


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(f"transformer_engine_torch.{name} is a stub: nothing is computed in this test")


def install() -> None:
    """Make Transformer Engine importable, and its modules constructible on a CPU."""
    sys.path.append(str(FOLDER))
    stub = _Stub("transformer_engine_torch")
    for name, members in _ENUMERATIONS.items():
        setattr(stub, name, enum.IntEnum(name, members))
    sys.modules[stub.__name__] = stub
    import torch
    import transformer_engine.common

    # It would look for the compiled file.
    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch.module.base as base

    construct = base.TransformerEngineBaseModule.__init__

    @functools.wraps(construct)
    def construct_without_gpu(*args: Any, **kwargs: Any) -> None:
        # The constructor refuses to run where no GPU is seen; it needs none.
        is_available = torch.cuda.is_available
        torch.cuda.is_available = lambda: True
        try:
            construct(*args, **kwargs)
        finally:
            torch.cuda.is_available = is_available

    base.TransformerEngineBaseModule.__init__ = construct_without_gpu
