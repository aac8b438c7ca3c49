"""A search server that misbehaves step by step.

    python scripted_server.py PORT STEP_FILE DEADLY_STEP

If the server runs as a separate process, it ends at the first request of step DEADLY_STEP without an answer.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

GOOD = json.dumps(
    {"result": [[{"document": {"id": "1", "contents": '"A"\nsomething known'}, "score": 1.0}]]}
).encode()
TOO_LARGE = b'{"result": "' + b"x" * (11 * 2**20) + b'"}'
BODIES = {
    "garbage": b"<html>\x00 not JSON",
    "oversized": TOO_LARGE,
    "not UTF-8": b'{"result": [["\xff\xfe"]]}',
    "wrong shape": b'{"result": [[{"document": 7}], []]}',
}
SLOW_S = 3.0


class ScriptedServer(ThreadingHTTPServer):
    """Answers as `script` demands for the step in `step_file`, and correctly in all other steps.

    Args:
        script: step -> a key of BODIES, "slow", "error" (HTTP 500), "down" (the connection is cut) or "die".
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, step_file: Path, script: dict[int, str], *, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.step_file, self.script = step_file, script
        self.asked: dict[int, int] = {}
        """Number of requests of each step."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/retrieve"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        step = int(self.server.step_file.read_text()) if self.server.step_file.exists() else 0
        self.server.asked[step] = self.server.asked.get(step, 0) + 1
        kind = self.server.script.get(step, "good")
        if kind == "die":
            os._exit(9)
        if kind == "slow":
            time.sleep(SLOW_S)
        if kind == "down":
            self.close_connection = True
            self.connection.close()
            return
        body = BODIES.get(kind, GOOD)
        self.send_response(500 if kind == "error" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


if __name__ == "__main__":
    port, step_file, deadly_step = sys.argv[1:]
    ScriptedServer(Path(step_file), {int(deadly_step): "die"}, port=int(port))
    threading.Event().wait()
