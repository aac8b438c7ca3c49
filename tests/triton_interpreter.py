"""A pytest plugin that gives the engines of this process vLLM's model runner for GPUs, with its Triton kernels
interpreted on the CPU.

Use `pytest -p triton_interpreter`, with this folder and a folder in which Triton is installed on PYTHONPATH.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import triton.backends

# vLLM's CPU build treats Triton as missing unless Triton can compile for CPUs. Interpreted kernels use no backend.
triton.backends.backends["cpu"] = SimpleNamespace(
    driver=SimpleNamespace(is_active=lambda: True), compiler=None
)

from triton.runtime import interpreter
from vllm.triton_utils import HAS_TRITON

assert HAS_TRITON, "vLLM does not take the interpreter for Triton"


def patch_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that patches triton.language for each module with kernels once, and leaves it patched.

    By default the interpreter patches a few hundred functions for each kernel that starts and for each function that
    a kernel calls, and restores them at the kernel's end. Nothing here uses the original functions.
    """
    modules: set[int] = set()
    stays = SimpleNamespace(restore=lambda: None)

    def patch_for(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in modules:
            patch(function)
            modules.add(module)
        return stays

    return patch_for


def remember(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `find` with a memory for its results, which depend only on the element type."""
    found: dict[str, Any] = {}

    def find_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    return find_once


interpreter._patch_lang = patch_once(interpreter._patch_lang)
interpreter._get_np_dtype = remember(interpreter._get_np_dtype)
