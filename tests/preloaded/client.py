"""Let the server whose socket is beside this file run a program, and end as the program does."""

import contextlib
import json
import os
import signal
import socket
import struct
import sys

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STREAMS = [0, 1, 2]


def main() -> None:
    arguments = sys.argv[1:]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "socket"))
        socket.send_fds(server, [struct.pack("!I", len(body))], STREAMS)
        server.sendall(body)
        pid = read_number(server)
        if pid == 0:  # the program must not be a fork
            os.execv(sys.executable, [sys.executable, *arguments])
        for number in PASSED_ON:
            signal.signal(number, lambda number, _frame: pass_on(pid, number))
        status = read_number(server)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def read_number(server: socket.socket) -> int:
    (number,) = struct.unpack("!i", server.recv(4, socket.MSG_WAITALL))
    return number


def pass_on(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have just ended
        os.kill(pid, number)


main()
