"""Start processes that run the policy's code, isolated as strictly as the machine allows."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from a2tgpo.config.python import PythonConfig
from a2tgpo.environment.sandbox import launcher
from a2tgpo.environment.sandbox.file_access import has_landlock
from a2tgpo.environment.sandbox.process import SandboxError, SandboxProcess
from a2tgpo.io.errors import ConfigError

ISOLATIONS = ("bwrap", "namespace", "seccomp")
"""All isolations, strictest first."""
MAX_FILE_BYTES = 1 << 20
"""Largest size of a file that the code writes."""
FOLDER_BYTES = 16 << 20
"""Largest size of the code's folder, if the isolation can limit this size."""
MAX_OPEN_FILES = 64
_INSIDE = "/tmp"
"""Path of the code's folder inside bubblewrap."""

logger = logging.getLogger(__name__)


class Sandbox:
    """Starts the processes of one tool.

    One thread, which lives as long as this object, starts all processes. The kernel ends a process when the thread
    that started the process ends, so no process outlives a trainer that is killed.
    """

    def __init__(self, config: PythonConfig, isolation: str):
        self._config = config
        self.isolation = isolation
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="python-tool")

    def start(self) -> SandboxProcess:
        """Start a process.

        Raises:
            SandboxError: if the process does not start or cannot isolate itself.
        """
        try:
            folder = None if self.isolation == "bwrap" else tempfile.mkdtemp(prefix="a2tgpo-python-")
        except OSError as error:  # for example, the disk is full
            raise SandboxError(f"no folder for the code: {error.strerror}") from None
        inside = folder or _INSIDE
        interpreter = os.path.realpath(sys.executable)
        python = [interpreter, "-P", "-s", "-S", "-B", launcher.__file__, self._settings(inside)]
        environment = {
            **{"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": inside, "TMPDIR": inside},
            **{"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        }
        command = python if folder else [*_bubblewrap(interpreter, self._config.packages), *python]
        return SandboxProcess(command, environment=environment, folder=folder, start=self._popen)

    def close(self) -> None:
        """End the thread that starts processes, and with it every process that still runs."""
        self._starter.shutdown(wait=False)

    def _popen(self, *args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started: Future[subprocess.Popen[bytes]] = self._starter.submit(subprocess.Popen, *args, **kwargs)
        return started.result()

    def _settings(self, folder: str) -> str:
        settings = {
            "isolation": self.isolation,
            "folder": folder,
            "folder_bytes": FOLDER_BYTES,
            "packages": os.path.realpath(self._config.packages) if self._config.packages else "",
            "timeout_s": self._config.timeout_s,
            "limits": {
                "RLIMIT_AS": self._config.memory_mib << 20,
                "RLIMIT_FSIZE": MAX_FILE_BYTES,
                "RLIMIT_NOFILE": MAX_OPEN_FILES,
                "RLIMIT_CORE": 0,
            },
        }
        return json.dumps(settings)


def build_sandbox(config: PythonConfig) -> Sandbox:
    """Return a sandbox with the configured isolation, after a test process has run in the sandbox.

    Raises:
        ConfigError: with a one-line message, if no allowed isolation works on this machine.
    """
    if config.packages and not Path(config.packages).is_dir():
        raise ConfigError(f"python.packages is {config.packages!r}; allowed: an existing folder")
    problems = []
    for isolation in ISOLATIONS if config.isolation == "auto" else (config.isolation,):
        sandbox = Sandbox(config, isolation)
        problem = _problem(sandbox)
        if problem is None:
            _log(isolation)
            return sandbox
        sandbox.close()
        problems.append(f"{isolation}: {problem}")
    raise ConfigError(
        f"python.isolation is {config.isolation!r}, which does not work on this machine ({'; '.join(problems)}); "
        "see docs/tools.md for what each isolation needs"
    )


def _problem(sandbox: Sandbox) -> str | None:
    """Return why code does not run in the sandbox, or None if it runs."""
    if sandbox.isolation == "bwrap" and shutil.which("bwrap") is None:
        return "there is no program bwrap"
    try:
        process = sandbox.start()
    except SandboxError as error:
        return str(error)
    output, end = process.run("print(6 * 7)", timeout_s=10.0, max_output_chars=1000)
    process.close()
    return None if output.strip() == "42" else end or f"it prints {output:.200}"


def _log(isolation: str) -> None:
    logger.info("the python tool's code is isolated by %s", isolation)
    if isolation != "bwrap" and not has_landlock():
        logger.warning(
            "warning: the code of the python tool can read and change the files that this user can: "
            "there is no bwrap program that works here, and the kernel has no Landlock (docs/tools.md)"
        )


def _bubblewrap(interpreter: str, packages: str) -> list[str]:
    """Return a bwrap command. Programs inside see only Python, the system's libraries and a folder in memory."""
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--dev", "/dev"]
    command += ["--size", str(FOLDER_BYTES), "--tmpfs", _INSIDE]
    for path in launcher.SYSTEM_FILES:
        if path.startswith("/dev/"):
            continue
        is_link = os.path.islink(path) and path.count("/") == 1
        command += ["--symlink", os.readlink(path), path] if is_link else ["--ro-bind-try", path, path]
    shown = [sys.base_prefix, sys.base_exec_prefix, interpreter, os.path.dirname(launcher.__file__)]
    for path in dict.fromkeys([*shown, *([os.path.realpath(packages)] if packages else [])]):
        if not path.startswith("/usr/"):
            command += ["--ro-bind", path, path]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", _INSIDE]
