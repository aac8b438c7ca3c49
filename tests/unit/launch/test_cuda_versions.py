"""The messages about a GPU driver or a CUDA toolkit that does not fit torch's CUDA version."""

import os
from pathlib import Path

import pytest

from a2tgpo.launch import cuda_versions
from a2tgpo.launch.cuda_versions import check_toolkit, driver_version, explain_unusable

PROC_FILE = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build  (root@host)  Sun Mar 30 04:04:10 UTC 2025
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""  # noqa: E501


@pytest.mark.parametrize(
    ("cuda", "driver", "visible", "said"),
    [
        ("13.0", "570.133.20", None, "the driver is 570.133.20, and CUDA 13.0 needs 580 or newer; update the driver"),
        ("13.0", "99.1", None, "needs 580 or newer"),
        ("12.8", "525.60.13", None, "CUDA 12.8 does not start with driver 525.60.13"),
        ("13.0", "580.65.06", "", "CUDA_VISIBLE_DEVICES is ''"),
        ("13.0", "", None, "does not start with driver of unknown version"),
        ("14.1", "580.65.06", None, "does not start with driver 580.65.06"),
        (None, "570.133.20", None, "torch is built for CPUs; run make setup-gpu"),
    ],
)  # fmt: skip
def test_why_torch_sees_no_gpu_is_one_line_with_the_driver_that_is_needed(cuda, driver, visible, said):
    line = explain_unusable(["nvidia0", "nvidia1"], cuda=cuda, driver=driver, visible=visible)
    assert line.startswith("torch sees no GPU, but there is nvidia0, nvidia1: ") and said in line
    assert "\n" not in line


def test_the_drivers_version_is_read_from_the_kernel_module_or_nvidia_smi(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr(cuda_versions, "DRIVER_FILE", file)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() == ""
    write_program(tmp_path / "nvidia-smi", "echo 580.95.05; echo 580.95.05")
    assert driver_version() == "580.95.05"
    file.write_text(PROC_FILE)
    assert driver_version() == "570.133.20"


def write_program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("release", "cuda", "said"),
    [
        ("13.0", "13.0", ""),
        ("12.4", "13.0", "/bin/nvcc of CUDA 12.4, torch is built for CUDA 13.0"),
        ("13.5", "13.0", "/bin/nvcc of CUDA 13.5, torch is built for CUDA 13.0"),
        ("12.4", None, ""),
    ],
)
@pytest.mark.parametrize("source", ["CUDA_HOME", "PATH"])
def test_a_toolkit_of_another_cuda_is_one_warning(tmp_path, release, cuda, said, source):
    write_program(
        tmp_path / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.88'"
    )
    places = {"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path / "bin")}
    warnings = check_toolkit(cuda, {source: places[source]})
    assert len(warnings) == bool(said)
    assert all(line.startswith(f"{source} points to {tmp_path}") and said in line for line in warnings)


def test_a_cuda_home_without_a_compiler_is_a_warning_and_no_toolkit_is_none(tmp_path):
    (warning,) = check_toolkit("13.0", {"CUDA_HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert warning.startswith(f"CUDA_HOME points to {tmp_path}/bin/nvcc, which does not report its version")
    assert check_toolkit("13.0", {"PATH": str(tmp_path)}) == []
