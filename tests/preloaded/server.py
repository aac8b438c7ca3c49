"""Import the large packages once, and fork a process for each program that a client requests.

    python server.py PYTHON SOCKET ROOT

PYTHON is the client, SOCKET the number of the listening socket, which is inherited, and ROOT the folder of the
sources. The server ends, with all programs, when its standard input is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import re
import runpy
import selectors
import signal
import socket
import struct
import sys
import tempfile
import threading
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "torch.distributed.run",
    "a2tgpo.parallel",  # before Megatron-Core
    "a2tgpo.assemble",
    "a2tgpo.trainer",
    "a2tgpo.launch.preflight",
)
READ_BY_IMPORTS = re.compile(
    "CUDA|HF_|HOME$|KMP_|LANG|LC_|LD_|MALLOC|MKL_|MPL|NVTE_|OMP_|PYTHON.|TOKENIZERS_|TORCH|TRANSFORMERS_|TRITON|VLLM_"
    "|XDG_"
)
"""Beginnings of the names of environment variables that modules read when they are imported."""
READ_LATER = re.compile(
    "PYTHON(PATH|UNBUFFERED|_EXEC)|TORCH(ELASTIC_|_CPP_LOG_LEVEL|_NCCL_)|VLLM_LOGGING_LEVEL"
    "|CUDA_DEVICE_MAX_CONNECTIONS|NVTE_(FLASH|FUSED|UNFUSED)_ATTN|TORCHINDUCTOR_CPP_DYNAMIC_THREADS"
    "|VLLM_(DISABLE_SHARED_EXPERTS_STREAM|DIST_IDENT|OBJECT_STORAGE|SSM_CONV_STATE_LAYOUT|WORKER_MULTIPROC_METHOD)"
)
"""Exceptions: variables of torchrun and its launcher, what `Program` takes care of, and variables that Megatron-Core
and vLLM set when a test builds a model or an engine in its own process."""


@dataclass
class Program:
    """What a client wants to run."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str

    def __post_init__(self) -> None:
        # An option that torchrun gives to ranks. The streams of forks have no buffers anyway.
        if self.arguments[:1] == ["-u"]:
            del self.arguments[0]

    @property
    def kind(self) -> str:
        """Return "-m", "-c", or "" for a file."""
        return self.arguments[0] if self.arguments[0] in ("-m", "-c") else ""

    @property
    def path(self) -> list[str]:
        """Return the first entries of sys.path."""
        first = self.folder if self.kind else os.path.dirname(os.path.join(self.folder, self.arguments[0]))
        given = self.environment.get("PYTHONPATH", "").split(os.pathsep)
        return [first, *(os.path.join(self.folder, entry) for entry in given if entry)]

    def can_be_forked(self, root: Path, imported_with: dict[str, str]) -> bool:
        """Return whether a fork of a process that imported the modules of `root` behaves as a new process does."""
        if not self.arguments or (self.arguments[0].startswith("-") and not self.kind):
            return False
        if _read_by_imports(self.environment) != _read_by_imports(imported_with):
            return False
        copies = (Path(entry, "a2tgpo") for entry in self.path)
        return next((copy.parent.resolve() for copy in copies if copy.is_dir()), root) == root

    def run(self) -> int:
        """Run the program in this process, and return its exit code."""
        try:
            try:
                self._run_main()
            finally:
                threading._shutdown()
                atexit._run_exitfuncs()
        except SystemExit as exit_:
            if exit_.code is None or isinstance(exit_.code, int):
                return (exit_.code or 0) & 0xFF
            print(exit_.code, file=sys.stderr)
            return 1
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def _run_main(self) -> None:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        if self.kind == "-m":
            sys.argv = ["-m", *self.arguments[2:]]
            sys.modules.pop(self.arguments[1], None)
            runpy._run_module_as_main(self.arguments[1])
        elif self.kind == "-c":
            sys.argv = ["-c", *self.arguments[2:]]
            exec(compile(self.arguments[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = self.arguments
            file = main.__file__ = os.path.abspath(self.arguments[0])
            exec(compile(Path(file).read_bytes(), file, "exec"), main.__dict__)


def _read_by_imports(environment: dict[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if READ_BY_IMPORTS.match(name) and not READ_LATER.match(name)
    }


class Server:
    """Handles requests, and the ends of programs and clients."""

    def __init__(self, python: str, listener: socket.socket, root: Path):
        self._python = python
        self._root = root
        self._started_with = dict(os.environ)
        self._set_by_imports: dict[str, str] | None = None
        """Environment variables that the modules set when they were imported. None before the import."""
        self._path = [
            entry for entry in sys.path[1:] if entry not in os.environ.get("PYTHONPATH", "").split(":")
        ]
        self._listener = listener
        self._running: dict[int, tuple[int, socket.socket]] = {}
        """By process id, the pidfd of each program and the connection to its client."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._end)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def serve(self) -> Program:
        """Serve until the session ends. Each fork returns from this method, with the program that it must run."""
        while True:
            # Take one event at a time, because its handler may close the file of the next.
            key, _ = self._selector.select()[0]
            program = key.data()
            if program is not None:
                return program

    def _accept(self) -> Program | None:
        client, _ = self._listener.accept()
        length, streams, *_ = socket.recv_fds(client, 4, 3)
        try:
            body = client.recv(struct.unpack("!I", length)[0], socket.MSG_WAITALL)
            program = Program(**json.loads(body))
        except (OSError, ValueError, struct.error):  # the client was killed
            client.close()
            self._close(*streams)
            return None
        if self._set_by_imports is None:
            self._preload()
        program.environment = self._set_by_imports | program.environment
        if not program.can_be_forked(self._root, self._started_with | self._set_by_imports):
            self._tell(client, 0)
            client.close()
            self._close(*streams)
            return None
        pid = os.fork()
        if pid == 0:
            self._enter(program, streams, client)
            return program
        self._close(*streams)
        pidfd = os.pidfd_open(pid)
        self._running[pid] = (pidfd, client)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._ended(pid))
        self._selector.register(client, selectors.EVENT_READ, lambda: self._abandoned(pid))
        self._tell(client, pid)
        return None

    def _preload(self) -> None:
        gc.disable()
        for module in MODULES:
            with contextlib.suppress(ImportError):  # the second leg of the tests has no vLLM
                importlib.import_module(module)
        self._set_by_imports = {k: v for k, v in os.environ.items() if self._started_with.get(k) != v}
        gc.freeze()  # a collection in a fork would copy every page of memory
        gc.enable()

    def _enter(self, program: Program, streams: list[int], client: socket.socket) -> None:
        """Make this fork behave like a process that the client has started."""
        os.setsid()
        for pidfd, connection in self._running.values():
            os.close(pidfd)
            connection.close()
        for file in (self._listener, self._selector, client):
            file.close()
        for number, passed in enumerate(streams):
            os.dup2(passed, number)
            os.close(passed)
        sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
        os.chdir(program.folder)
        os.environ.clear()
        os.environ.update(program.environment)
        sys.path[:] = [*program.path, *self._path]
        sys.executable = self._python
        tempfile.tempdir = None
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # a fork of random's generator has another seed already
        if "vllm.logger" in sys.modules:
            sys.modules["vllm.logger"]._configure_vllm_root_logger()  # with this program's VLLM_LOGGING_LEVEL

    def _ended(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        client = self._forget(pid)
        self._tell(client, status)
        client.close()

    def _abandoned(self, pid: int) -> None:
        """Kill a program whose client was killed."""
        self._kill(pid)
        os.waitpid(pid, 0)
        self._forget(pid).close()

    def _forget(self, pid: int) -> socket.socket:
        pidfd, client = self._running.pop(pid)
        self._selector.unregister(pidfd)
        self._selector.unregister(client)
        os.close(pidfd)
        return client

    @staticmethod
    def _tell(client: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):  # the client may have been killed
            client.sendall(struct.pack("!i", number))

    @staticmethod
    def _close(*streams: int) -> None:
        for stream in streams:
            os.close(stream)

    @staticmethod
    def _kill(pid: int) -> None:
        for kill in (os.killpg, os.kill):  # a very young fork does not yet lead a group
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)

    def _end(self) -> None:
        for pid in self._running:
            self._kill(pid)
        for pid in self._running:
            os.waitpid(pid, 0)
        sys.exit()


def main(python: str, listener: str, root: str) -> None:
    program = Server(python, socket.socket(fileno=int(listener)), Path(root).resolve()).serve()
    code = program.run()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # freeing a thousand modules takes longer than many programs


if __name__ == "__main__":
    main(*sys.argv[1:])
