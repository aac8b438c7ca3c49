"""A pytest plugin: engines of this process have vLLM's GPU model runner, its Triton kernels interpreted on the CPU.

`pytest -p triton_interpreter`, with this folder and one that Triton is installed in on PYTHONPATH.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import triton.backends

# vLLM's CPU build takes Triton for absent unless it can compile for CPUs; interpreted kernels ask no backend.
triton.backends.backends["cpu"] = SimpleNamespace(
    driver=SimpleNamespace(is_active=lambda: True), compiler=None
)

from vllm.triton_utils import HAS_TRITON

assert HAS_TRITON, "vLLM does not take the interpreter for Triton"
