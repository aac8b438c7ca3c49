"""Check that this machine's GPU driver and CUDA toolkit fit the CUDA version that torch was built for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

LEAST_DRIVERS = {12: 525, 13: 580}
"""Major version of CUDA -> first driver branch that runs all minor versions of this major version."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""File that the driver's loaded kernel module provides."""


def driver_version() -> str:
    """Return the version of the loaded NVIDIA driver, e.g. 580.95.05, or an empty string if no driver is loaded."""
    try:
        text = DRIVER_FILE.read_text()
    except OSError:
        text = _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found.group() if found else ""


def unusable_gpus() -> list[str]:
    """Return lines that say why torch sees none of this machine's GPUs; an empty list if the machine has no GPU.

    Call this if torch sees no GPU. A run on a machine with unusable GPUs would otherwise train on its CPUs.
    """
    import torch

    cards = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if not cards:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [explain_unusable(cards, cuda=torch.version.cuda, driver=driver_version(), visible=visible)]


def explain_unusable(cards: Sequence[str], *, cuda: str | None, driver: str, visible: str | None) -> str:
    """Return one line that says why CUDA does not start on a machine with GPUs, and how to repair the fault.

    Args:
        cards: the names of the GPUs' device files, e.g. nvidia0.
        cuda: `torch.version.cuda`, which is None if torch was built for CPUs.
        driver: the result of `driver_version`.
        visible: the value of CUDA_VISIBLE_DEVICES, or None if the variable is not set.
    """
    start = f"torch sees no GPU, but there is {', '.join(cards)}: "
    if cuda is None:
        return start + "torch is built for CPUs; run make setup-gpu"
    least = LEAST_DRIVERS.get(_numbers(cuda)[0], 0)
    if driver and _numbers(driver)[0] < least:
        return start + f"the driver is {driver}, and CUDA {cuda} needs {least} or newer; update the driver"
    if visible is not None:
        return start + f"CUDA_VISIBLE_DEVICES is {visible!r}"
    return start + f"CUDA {cuda} does not start with driver {driver or 'of unknown version'}; see nvidia-smi"


def find_nvcc(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the path of the CUDA compiler for run-time compilation, and the variable that led to it.

    The variable is CUDA_HOME or PATH. The path is empty if no compiler was found.
    """
    if home := environment.get("CUDA_HOME"):
        return str(Path(home) / "bin" / "nvcc"), "CUDA_HOME"
    return shutil.which("nvcc", path=environment.get("PATH")) or "", "PATH"


def check_toolkit(cuda: str | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return a warning if the CUDA version of the compiler that builds kernels at run time is not `cuda`.

    Args:
        cuda: the CUDA version that torch was built for, or None if torch was built for CPUs.
    """
    nvcc, source = find_nvcc(environment)
    if cuda is None or not nvcc:
        return []
    release = re.search(r"release (\d+\.\d+)", _output_of([nvcc, "--version"]))
    if release is None:
        return [
            f"{source} points to {nvcc}, which does not report its version; set CUDA_HOME to a CUDA {cuda} toolkit"
        ]
    if _numbers(release.group(1)) == _numbers(cuda)[:2]:
        return []
    return [
        f"{source} points to {nvcc} of CUDA {release.group(1)}, torch is built for CUDA {cuda}: kernels compiled at "
        f"run time would mix both; set CUDA_HOME to a CUDA {cuda} toolkit"
    ]


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
