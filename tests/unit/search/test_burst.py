"""Whether a server keeps up, measured on a real server that is slow for every query."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from a2tgpo.config.search import SearchConfig
from a2tgpo.search.burst import Burst, judge_burst, measure_burst

SECONDS_A_QUERY = 0.02
ASKED: list[str] = []


class OneAtATime(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    busy = threading.Lock()

    def do_POST(self):
        ASKED.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"])
        with self.busy:
            time.sleep(SECONDS_A_QUERY)
        self.send_response(200)
        self.send_header("Content-Length", "16")
        self.end_headers()
        self.wfile.write(b'{"result": [[]]}')

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), OneAtATime)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/retrieve"
    server.shutdown()
    server.server_close()


def test_a_burst_counts_what_is_answered_and_asks_nothing_twice(url):
    config = SearchConfig(backend="http", url=url)
    burst = measure_burst(config, ["a", "b"], clients=8, seconds=0.5)
    assert burst.clients == 8 and burst.failed == 0 and burst.answered == len(ASKED) >= 8
    assert len(set(ASKED)) == len(ASKED)
    assert burst.per_second <= 1 / SECONDS_A_QUERY  # whatever the number of clients


def test_a_server_that_does_not_keep_up_is_told_with_numbers_and_then_refused():
    burst = Burst(clients=128, answered=50, failed=78, seconds=20.0)
    line, is_refused = judge_burst(burst, needed_per_s=67.0, max_shortfall=8.0)
    assert is_refused and line.startswith(
        "the search server answers 2.5 queries/s of 128 clients at a time (78 of 128 had no answer in time), the "
        "planned rollout needs 67.0/s, 26.8 times as many; "
    )
    assert judge_burst(burst, needed_per_s=67.0, max_shortfall=30.0) == (line, False)
    assert judge_burst(burst, needed_per_s=67.0, max_shortfall=0.0) == (line, False)
    assert judge_burst(burst, needed_per_s=2.0, max_shortfall=8.0) == ("", False)
    dead = Burst(clients=4, answered=0, failed=4, seconds=30.0)
    assert judge_burst(dead, needed_per_s=1.0, max_shortfall=8.0)[1]
