"""Make runs with the same settings equal to the bit on GPUs, too (`run.deterministic`)."""

from __future__ import annotations

import os

import torch

from a2tgpo.io.errors import ConfigError

ENGINE_NCCL_VARIABLES = (
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_NTHREADS"),
    *("NCCL_COLLNET_ENABLE", "NCCL_NVLS_ENABLE", "NCCL_P2P_NET_DISABLE", "NCCL_SOCKET_NTHREADS"),
    "NCCL_LAUNCH_MODE",
)
"""Variables that vLLM sets for its own communicators if its kernels are batch-invariant
(vllm/model_executor/determinism/batch_invariant.py)."""

VARIABLES = {
    # The backward pass of Transformer Engine's attention then adds in a fixed order.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # With the smallest workspace, cuBLAS never splits the sum of a product, so the result for a row does not depend
    # on the number of rows. vLLM sets the same values, but only after the trainer has created its cuBLAS handles.
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "CUBLASLT_WORKSPACE_SIZE": "1",
    "NCCL_ALGO": "Ring",
    # By default, NCCL reads a variable only once, and would ignore the values that vLLM sets later.
    "NCCL_NO_CACHE": ",".join(ENGINE_NCCL_VARIABLES),
}
"""Environment variables of a deterministic run."""

ENGINE_VARIABLE = "VLLM_BATCH_INVARIANT"
"""vLLM's switch for kernels whose result for a request does not depend on the other requests of the batch. Which
requests share a batch depends on when tools answer."""

FIRST_CAPABILITY = (9, 0)
"""Lowest compute capability on which trainer and batch-invariant kernels work in one process. On older cards, vLLM
replaces torch's linear and matmul by kernels without a backward pass, in the whole process."""


def compute_deterministically(*, with_engine: bool = True) -> None:
    """Set environment variables and options of torch so that this process computes in a fixed order.

    Call this before the process uses cuBLAS, NCCL or Transformer Engine, and before it builds an engine or a model.
    `transformer_config` then also sets Megatron's deterministic mode. After this call, an operation of torch that has
    no deterministic implementation raises RuntimeError.

    Args:
        with_engine: whether the process builds an engine.

    Raises:
        ConfigError: if a variable is already set to another value, or if the process builds an engine on a GPU that
            is too old.
    """
    wanted = dict(VARIABLES)
    # vLLM's batch-invariant kernels need a GPU. On a CPU, its usual kernels are batch-invariant already.
    if with_engine and torch.cuda.is_available():
        _refuse_old_cards()
        wanted[ENGINE_VARIABLE] = "1"
    for name, value in wanted.items():
        found = os.environ.get(name, value)
        if found != value:
            raise ConfigError(
                f"the environment variable {name} is {found!r}; allowed with run.deterministic=true: {value!r}; "
                "remove the variable, or set run.deterministic=false"
            )
    os.environ.update(wanted)
    # This also makes Inductor choose kernels by rules, not by measured times.
    torch.use_deterministic_algorithms(True)
    # Do not fill new tensors with NaN. Filling takes time, and vLLM never reads what it computes from unfilled rows.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _refuse_old_cards() -> None:
    device = int(os.environ.get("LOCAL_RANK", "0"))
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        raise ConfigError(
            f"run.deterministic is true; allowed: false on {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}), since vLLM's batch-invariant kernels have a backward pass only from "
            f"{FIRST_CAPABILITY[0]}.{FIRST_CAPABILITY[1]} on"
        )
