"""`transformer_engine_torch`, the compiled part of Transformer Engine, in plain PyTorch: the rest runs on a CPU.

Everything else is Transformer Engine's own: modules, autograd functions, recipes, quantizers, caches of FP8 weights,
ring attention, FusedAdam. Functions that the project's models do not call raise `NotImplementedError`.

The meaning of each function was read from the signatures and the C++ sources of release 2.20. The numbers follow the
definition: float32 inside, one rounding at the end. This reference cannot show a kernel's order of summation, which
shapes cuDNN and cuBLASLt accept, streams, or memory.

`install()` patches Transformer Engine and torch.Tensor, so a program that calls it needs a process of its own, with
`ENVIRONMENT` around it and `FOLDER` on its PYTHONPATH.
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
"""Where `make setup-py312` puts Transformer Engine's wheels, apart from the packages of the environment: beside them
Megatron would find it, and could not be imported without this package."""

ENVIRONMENT = {
    "NVTE_PROJECT_BUILDING": "1",  # the package then looks for no CUDA library and none of its own
    "NVTE_TORCH_COMPILE": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "TRITON_INTERPRET": "1",  # the permutation of experts' tokens is written in Triton
}
"""What a process that calls `install` is started with: torch and Triton read it when they are imported."""

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
"""Those whose values the Python code counts on; any others are numbered in the order in which they are read."""


def install() -> None:
    """Make Transformer Engine importable and executable on a CPU.

    Call it after `a2tgpo.parallel` was imported and before anything of megatron is.
    """
    cpu_seam.install()
    sys.modules["transformer_engine_torch"] = _extension()
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None  # it would look for the file


def _extension() -> types.ModuleType:
    extension = _Extension("transformer_engine_torch")
    for name, members in _ENUMERATIONS.items():
        setattr(extension, name, enum.IntEnum(name, members))
    for part in (attention, experts, optimizer, products, quantization, ring):
        for name in part.__all__:
            setattr(extension, name, getattr(part, name))
    # `from transformer_engine_torch import *` takes what the module's dictionary holds, so all names must be there.
    for source in FOLDER.joinpath("transformer_engine", "pytorch").rglob("*.py"):
        for name in re.findall(r"\b(?:tex|ext)\.([A-Za-z_]\w*)", source.read_text()):
            getattr(extension, name)
    return extension


class _Extension(types.ModuleType):
    """What is not written is a class where the name begins with a capital, otherwise a function that raises."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = _Numbered(name, (), {}) if name[0].isupper() else functools.partial(_refuse, name)
        setattr(self, name, value)
        return value


class _Numbered(type):
    """A class each of whose attributes is an integer of its own, as the members of an enumeration are."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = len([key for key in vars(cls) if not key.startswith("__")])
        setattr(cls, name, value)
        return value


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"transformer_engine_torch.{name} is not part of the reference")
