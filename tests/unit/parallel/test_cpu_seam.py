"""parallel/cpu.py and parallel/cpu_adam.py make Megatron run on a CPU and leave torch unchanged for other code."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import a2tgpo.parallel  # noqa: F401
from a2tgpo.parallel.cpu_adam import CpuFusedAdam

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the seam is inactive where there is a GPU")


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@no_gpu
def test_megatron_imported_first_is_refused_with_what_to_do() -> None:
    process = run_python("import megatron.core, a2tgpo.parallel")
    assert process.returncode == 1
    assert "import a2tgpo.parallel first" in process.stderr.strip().splitlines()[-1]


@no_gpu
def test_importing_the_package_does_not_import_megatron_and_says_nothing() -> None:
    process = run_python(
        "import a2tgpo.parallel, sys; assert not [m for m in sys.modules if 'megatron' in m]"
    )
    assert process.returncode == 0, process.stderr
    process = run_python("import a2tgpo.parallel, megatron.core.optimizer, megatron.core.models.gpt")
    assert process.returncode == 0 and "Apex" not in process.stderr, process.stderr


@no_gpu
def test_only_megatron_sees_a_cuda_device() -> None:
    from megatron.core import parallel_state

    assert parallel_state.torch.zeros(2, device="cuda").device.type == "cpu"
    assert parallel_state.torch.cuda.current_device() == torch.device("cpu")
    assert parallel_state.torch.float32 is torch.float32
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()


@no_gpu
def test_type_names_equal_both_spellings_and_no_other() -> None:
    name = torch.zeros(1).type()
    assert name == "torch.FloatTensor" and name == "torch.cuda.FloatTensor"
    assert name != "torch.cuda.HalfTensor" and name not in ["torch.cuda.BFloat16Tensor"]
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam_equals_torch_adamw_step_by_step(weight_decay: float) -> None:
    start = torch.randn(50, generator=torch.Generator().manual_seed(0))
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": weight_decay}
    optimizers = [(mine, CpuFusedAdam([mine], **options)), (theirs, torch.optim.AdamW([theirs], **options))]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        grad = torch.randn(50, generator=generator)
        for parameter, optimizer in optimizers:
            parameter.grad = grad.clone()
            optimizer.step()
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-7)
    assert (mine - start).abs().mean() > 0.01


def test_adam_keeps_the_state_that_fused_adam_keeps() -> None:
    moved, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = CpuFusedAdam([moved, unused], lr=0.1)
    moved.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    assert set(optimizer.state[moved]) == {"exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[0]["step"] == 2
    assert unused not in optimizer.state and torch.equal(unused, torch.ones(3))
