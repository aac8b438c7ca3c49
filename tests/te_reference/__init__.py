"""A version of `transformer_engine_torch`, the compiled part of Transformer Engine, in plain PyTorch for CPUs.

All other code is Transformer Engine's own: modules, autograd functions, recipes, quantizers, caches of FP8 weights,
ring attention, FusedAdam. Functions that the project's models do not call raise `NotImplementedError`.

The functions were written from the signatures and the C++ sources of release 2.20. They compute in float32, and round
once at the end. This reference does not show a kernel's order of summation, the shapes that cuDNN and cuBLASLt
accept, streams, or memory.

`install()` patches Transformer Engine and torch.Tensor, so a program that calls it needs a separate process. The
process needs the environment `ENVIRONMENT`, and `FOLDER` on its PYTHONPATH.
"""

from __future__ import annotations

import enum
import functools
import re
import sys
import types
from pathlib import Path
from typing import Any

from te_reference import attention, cpu_seam, experts, optimizer, products, quantization, ring

FOLDER = Path(sys.prefix) / "transformer-engine"
"""The folder in which `make setup-py312` installs Transformer Engine's wheels. If the wheels were among the
environment's packages, Megatron would find them, and could not be imported without this module.
"""

ENVIRONMENT = {
    "NVTE_PROJECT_BUILDING": "1",  # the package then looks neither for CUDA libraries nor for its own
    "NVTE_TORCH_COMPILE": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "TRITON_INTERPRET": "1",  # the permutation of the experts' tokens is written in Triton
}
"""Environment variables of a process that calls `install`. torch and Triton read them when they are imported."""

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
    "FP8FwdTensors": {
        f"GEMM{product}_{kind}": 3 * (product - 1) + place
        for product in (1, 2, 3)
        for place, kind in enumerate(("INPUT", "WEIGHT", "OUTPUT"))
    },
    "FP8BwdTensors": {
        f"GRAD_{kind}{product}": 2 * (product - 1) + place
        for product in (1, 2, 3)
        for place, kind in enumerate(("OUTPUT", "INPUT"))
    },
    "NVTE_Fused_Attn_Backend": {"NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2, "NVTE_No_Backend": -1},
}
"""Enumerations whose values the Python code relies on. Members of all other enumerations are numbered in the order of
their first use.
"""


def install() -> None:
    """Make Transformer Engine importable and executable on a CPU.

    Call it after the import of `a2tgpo.parallel`, and before any import of megatron.
    """
    cpu_seam.install()
    sys.modules["transformer_engine_torch"] = _extension()
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: (
        None
    )  # the original function would look for the file


def _extension() -> types.ModuleType:
    extension = _Extension("transformer_engine_torch")
    for name, members in _ENUMERATIONS.items():
        setattr(extension, name, enum.IntEnum(name, members))
    for part in (attention, experts, optimizer, products, quantization, ring):
        for name in part.__all__:
            setattr(extension, name, getattr(part, name))
    # `from transformer_engine_torch import *` imports the names in the module's dictionary, so the dictionary must
    # have all names.
    for source in FOLDER.joinpath("transformer_engine", "pytorch").rglob("*.py"):
        for name in re.findall(r"\b(?:tex|ext)\.([A-Za-z_]\w*)", source.read_text()):
            getattr(extension, name)
    return extension


class _Extension(types.ModuleType):
    """A missing name becomes a class if it begins with a capital, and otherwise a function that raises an error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = _Numbered(name, (), {}) if name[0].isupper() else functools.partial(_refuse, name)
        setattr(self, name, value)
        return value


class _Numbered(type):
    """A class whose attributes are different integers, like the members of an enumeration."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = len([key for key in vars(cls) if not key.startswith("__")])
        setattr(cls, name, value)
        return value


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"transformer_engine_torch.{name} is not part of the reference")
