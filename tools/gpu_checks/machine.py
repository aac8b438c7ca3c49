"""Describe the machine on which the checks run: versions, driver and GPUs."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from typing import Any

from a2tgpo.launch.cuda_versions import check_toolkit, unusable_gpus
from a2tgpo.run.versions import PACKAGES

from gpu_checks.bench import Row

CUDA_PACKAGES = ("nvidia-nccl-cu13", "nvidia-cudnn-cu13")


def describe_machine() -> dict[str, Any]:
    """Return versions of packages, driver and Python, the GPUs, and the connections between the GPUs."""
    versions = {}
    for package in (*PACKAGES, *CUDA_PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    # Also ask is_available, because device_count includes GPUs that cannot be used with an old driver.
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    first = torch.cuda.get_device_properties(0) if seen else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions,
        "gpus": output_of(query).splitlines(),
        "gpus_seen_by_torch": seen,
        "unusable": [] if seen else unusable_gpus(),
        "warnings": check_toolkit(torch.version.cuda) if seen else [],
        "gpu_name": first.name if first else None,
        "gpu_memory_gib": first.total_memory / 2**30 if first else None,
        "topology": output_of(["nvidia-smi", "topo", "-m"]),
    }


def gpus_row(machine: dict[str, Any]) -> Row:
    """Return a row that fails if the driver lists GPUs but torch cannot use them."""
    seen = machine["gpus_seen_by_torch"]
    return Row(
        check="machine",
        name="GPUs seen by torch",
        status="PASS" if seen else "FAIL",
        measured=seen,
        limit=1,
        relation=">=",
        note="; ".join([f"the driver lists {len(machine['gpus'])}", *machine["unusable"]]),
    )


def output_of(command: list[str]) -> str:
    """Run `command` and return its output. Return "" if the command does not exist, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine_text(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    cards = "\n".join(machine["gpus"]) or "No GPU is seen: checks that mean something on a CPU run on gloo"
    warnings = [f"warning: {text}" for text in machine["warnings"]]
    parts = [f"Python {machine['python']}, {versions}", cards, machine["topology"], *warnings]
    return "\n".join(part for part in parts if part)
