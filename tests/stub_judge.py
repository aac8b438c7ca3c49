"""A server with OpenAI's chat interface that replies according to a script, over real HTTP."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, str, dict[str, str]] | None
"""Status, body and headers. None means that the server closes the connection."""


def chat(text: str) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}), {}


class StubJudge:
    """Answers each request with `script(prompt, number of earlier requests with this prompt)`."""

    def __init__(self, script: Callable[[str, int], Reply]):
        self.asked: list[dict] = []
        self.tokens: set[str | None] = set()
        lock, times = threading.Lock(), Counter[str]()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:
                request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                prompt = request["messages"][0]["content"]
                with lock:
                    self.asked.append(request | {"path": handler.path})
                    self.tokens.add(handler.headers.get("Authorization"))
                    before, times[prompt] = times[prompt], times[prompt] + 1
                reply = script(prompt, before)
                if reply is None:
                    handler.close_connection = True
                    return
                status, body, headers = reply
                handler.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body.encode()))}).items():
                    handler.send_header(name, value)
                handler.end_headers()
                handler.wfile.write(body.encode())

            def log_message(handler, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
