"""A pytest plugin that gives the engines of this process vLLM's model runner for GPUs, with its Triton kernels
interpreted on the CPU.

Use `pytest -p triton_interpreter`, with this folder and a folder in which Triton is installed on PYTHONPATH.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import triton.backends

# vLLM's CPU build treats Triton as missing unless Triton can compile for CPUs. Interpreted kernels use no backend.
triton.backends.backends["cpu"] = SimpleNamespace(
    driver=SimpleNamespace(is_active=lambda: True), compiler=None
)

from vllm.triton_utils import HAS_TRITON

assert HAS_TRITON, "vLLM does not take the interpreter for Triton"
