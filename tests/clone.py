"""Copy the sources to a folder, and run commands in the copy as a user would."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from preloaded.session import Session

ROOT = Path(__file__).parents[1]


def commands(block: str) -> list[list[str]]:
    """Return the words of every command in a code block of a page."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words for words in lines if words]


class Clone:
    """A copy of the sources in which commands are run as a user would type them."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("a2tgpo", "configs", "launch", "tools"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.server: subprocess.Popen | None = None
        self._session: Session | None = None
        self.address = ""
        binaries = str(Path(sys.executable).parent)  # the effect of `source .venv/bin/activate`
        self.environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.environment["PYTHONPATH"] = str(folder)  # as after an editable install, Python finds the sources

    def __call__(self, words: list[str], *, timeout: int = 300) -> subprocess.CompletedProcess:
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done

    def preload(self) -> None:
        """From now on, run programs as forks of a process that has imported the packages."""
        self._session = Session(self.folder, self.environment)
        self.environment["PATH"] = f"{Path(self._session.python).parent}:{self.environment['PATH']}"

    def serve(self, words: list[str]) -> None:
        self.server = subprocess.Popen(
            words, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        self.address = re.search(r"http://\S+", self.server.stdout.readline()).group()

    def close(self) -> None:
        """End the search server and the server that runs programs."""
        if self._session is not None:
            self._session.close()
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(timeout=30) == 0
