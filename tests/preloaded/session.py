"""The server of a test session, and of each copy of the sources in which a test runs programs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Session:
    """Starts a server and ends it. The server imports the packages when it gets the first program.

    Args:
        root: folder of the sources that the programs import.
        environment: environment variables of the server. A program can be a fork only if it has the same values of
            the variables that modules read when they are imported.
    """

    def __init__(self, root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="preloaded-"))
        self.python = str(self._folder / "python")
        """Path of the client."""
        # -I and -S leave out the site packages, so that the client starts in a hundredth of a second.
        Path(self.python).write_text(f"#!{sys.executable} -IS\n" + (HERE / "client.py").read_text())
        Path(self.python).chmod(0o755)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self._folder / "socket"))
            listener.listen(64)
            number = listener.fileno()
            # The server ends when this process has closed the pipe.
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "server.py"), self.python, str(number), str(root)],
                env=dict(environment),
                stdin=subprocess.PIPE,
                pass_fds=[number],
                start_new_session=True,
            )

    def close(self) -> None:
        self._process.communicate()
        shutil.rmtree(self._folder)
