"""Describe the environment of a start, and compare its packages and code with those of the last start."""

from __future__ import annotations

import datetime
import getpass
import os
import platform
import shlex
import sys
from collections.abc import Mapping

from a2tgpo.config.user_files import PREFIX
from a2tgpo.run.rules import Changes, changes
from a2tgpo.run.versions import UNCOMMITTED, UNKNOWN, code_fingerprint, commit_line, package_versions


def describe_environment(files: Mapping[str, str] | None = None) -> str:
    """Return facts about this process, such as time, place, GPU, package versions and code, as lines `NAME VALUE`.

    Args:
        files: digests of the user's files (`config.user_files.file_digests`).
    """
    lines = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "user": _user(),
        "host": platform.node(),
        "job": os.environ.get("SLURM_JOB_ID", "none"),
        "command": shlex.join(sys.argv),
        "platform": platform.platform(),
        "gpu": _gpus(),
        **package_versions(),
        "commit": commit_line(),
        "code": code_fingerprint(),
        **(files or {}),
    }
    return "".join(f"{name} {' '.join(value.splitlines())}\n" for name, value in lines.items())


def parse_environment(text: str) -> dict[str, str]:
    """Return a map from each name to its value in `text`, which `describe_environment` returned."""
    return {name: value for name, _, value in (line.partition(" ") for line in text.splitlines())}


def environment_changes(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[Changes, Changes]:
    """Return the changes of packages, code and the user's files as two maps: refused changes and reported changes.

    Code is compared by content, so a commit that changes no executed file is not a change. A change of code is
    reported, but not refused, if the last start had uncommitted changes or no checkout.
    """
    compared = [*package_versions(), *(name for name in now if name.startswith(PREFIX))]
    packages = changes(before, {name: now[name] for name in compared})
    if before.get("code", now["code"]) == now["code"]:
        return packages, {}
    was, is_now = before.get("commit", UNKNOWN), now["commit"]
    code: Changes = {"code": (_short(was), _short(is_now))}
    if was == UNKNOWN or was.endswith(UNCOMMITTED):
        return packages, code
    return packages | code, {}


def _short(line: str) -> str:
    commit, _, rest = line.partition(" ")
    return f"commit {commit[:10]}" + (f" {rest}" if rest else "")


def _gpus() -> str:
    """Return the number of ranks and the kind of this rank's GPU as one text, or "none" if there is no GPU."""
    import torch  # imported here, because programs import this module before they parse their arguments
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return "none"
    return f"{dist.get_world_size() if dist.is_initialized() else 1} x {torch.cuda.get_device_name()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # the user of a container may have no name
        return str(os.getuid())
