import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import zstandard

from a2tgpo.config.search import SearchConfig
from a2tgpo.environment.tool import Toolset
from a2tgpo.environment.tools.search import Search
from a2tgpo.io.errors import ConfigError
from a2tgpo.net.circuit_breaker import CircuitBreaker
from a2tgpo.search.errors import SearchError, SearchUnavailableError
from a2tgpo.search.http_client import MAX_RESPONSE_BYTES, HttpSearch
from a2tgpo.search.passage import Passage
from a2tgpo.search.server_address import ServerAddress, write_address
from a2tgpo.search.tool import CachedSearch, build_search

LIMA = Passage("1", "Lima", "Lima is the capital of Peru.")


def answer(*hits):
    return json.dumps({"result": [list(hits)]}).encode()


PATIENT = {"break_after": 1000, "break_s": 1.0}
GOOD = answer({"document": {"id": "1", "contents": LIMA.contents}, "score": 2.5})


class Scripted(ThreadingHTTPServer):
    """Plays one entry of `script` per request and then repeats the last: bytes | (status, bytes) |
    callable(handler).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.script = [GOOD]
        self.requests = []
        self.released = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/retrieve"

    def handle_error(self, request, client_address):
        """Ignore clients that hang up, since these tests have some."""


class ScriptedHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        script = self.server.script
        reply = script.pop(0) if len(script) > 1 else script[0]
        if callable(reply):
            reply(self)
            return
        status, body = reply if isinstance(reply, tuple) else (200, reply)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def stall(handler):
    handler.server.released.wait(20)
    handler.close_connection = True


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.released.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def compress(handler):
    """Send a compressed answer of 64 MiB that the client did not ask for."""
    body = zstandard.ZstdCompressor().compress(bytes(2**26))
    assert handler.headers["Accept-Encoding"] == "identity"
    handler.send_response(200)
    handler.send_header("Content-Encoding", "zstd")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def hang_up(handler):
    handler.close_connection = True


@pytest.fixture
def server():
    scripted = Scripted()
    thread = threading.Thread(target=scripted.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield scripted
    scripted.released.set()
    scripted.shutdown()
    thread.join(10)
    scripted.server_close()


@pytest.fixture
def client(server):
    client = HttpSearch(
        server.url, timeout_s=2, max_attempts=2, max_connections=4, first_wait_s=0.01, **PATIENT
    )
    yield client
    client.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_request_and_answer_follow_the_wire_format(server, client):
    assert client.search("capital of Peru", 3) == [(LIMA, 2.5)]
    assert server.requests == [{"queries": ["capital of Peru"], "topk": 3, "return_scores": True}]


def test_answers_without_scores_or_ids_and_too_many_are_read(server, client):
    server.script = [
        answer({"contents": LIMA.contents}, {"document": {"contents": "b"}, "score": 1}, {"contents": "c"})
    ]
    assert client.search("x", 2) == [(Passage("0", "Lima", LIMA.text), 0.0), (Passage("1", "", "b"), 1.0)]
    server.script = [answer()]
    assert client.search("x", 2) == []


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"<html>busy</html>", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "one list for the one query"),
        (b'{"result": []}', "one list for the one query"),
        (b'{"result": [[], []]}', "one list for the one query"),
        (answer("text"), "passage 0 has no document.contents"),
        (answer({"document": {"contents": 3}}), "passage 0 has no document.contents"),
        (answer({"document": {"contents": "x"}, "score": "high"}), "passage 0 has score 'high'"),
        ((500, b"oops"), "HTTP 500 Internal Server Error"),
        ((503, b""), "HTTP 503"),
        (compress, "not UTF-8"),
        (hang_up, "cannot be reached"),
        (stall, "did not answer within 2 s"),
        (drip, "did not answer within 2 s"),
    ],
)
def test_bad_answer_is_one_line_after_all_tries_and_a_good_one_mends_it(server, client, reply, says):
    server.script = [reply]
    with pytest.raises(SearchError) as caught:
        client.search("x", 3)
    assert says in str(caught.value)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (len(server.requests), client.num_retries) == (2, 1)
    server.script = [reply, GOOD]
    assert client.search("x", 3) == [(LIMA, 2.5)]
    assert (len(server.requests), client.num_retries) == (4, 2)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((404, b""), "HTTP 404"),
        ((422, b"no topk"), "HTTP 422"),
        (answer({"contents": "x" * MAX_RESPONSE_BYTES}), "more than 10 MiB"),
    ],
)
def test_what_another_try_cannot_mend_is_not_tried_again(server, client, reply, says):
    server.script = [reply]
    with pytest.raises(SearchError, match=says):
        client.search("x", 3)
    assert len(server.requests) == 1


def fails_at(text, reply):
    """Return a handler that answers queries correctly unless they contain `text`."""

    def play(handler):
        query = handler.server.requests[-1]["queries"][0]
        status, body = reply if text in query else (200, GOOD)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return play


@pytest.mark.parametrize(
    ("reply", "is_outage"),
    [
        (fails_at("", (500, b"")), True),
        (fails_at("", (200, b"garbage")), True),
        (fails_at("", (503, b"")), True),
        (fails_at("", (404, b"")), True),
        (fails_at("", (401, b"")), True),
        (hang_up, True),
        (stall, True),
        (fails_at("poison", (500, b"")), False),
        (fails_at("poison", (200, b"garbage")), False),
        (fails_at("poison", (422, b"")), False),
        (fails_at("poison", (503, b"")), True),  # for example from a proxy in front of several servers
    ],
)
def test_a_server_out_of_service_is_told_from_a_query_that_it_cannot_answer(server, reply, is_outage):
    client = HttpSearch(
        server.url, timeout_s=0.3, max_attempts=1, max_connections=4, first_wait_s=0.01, **PATIENT
    )
    search = CachedSearch(client, top_k=3, tells_outages=True)
    server.script = [reply]
    with pytest.raises(SearchError) as caught:
        search.search("poison")
    assert isinstance(caught.value, SearchUnavailableError) == is_outage
    search.close()


def test_a_server_that_moves_is_found_by_its_file(server, tmp_path):
    file = tmp_path / "url"
    write_address(file, f"http://127.0.0.1:{free_port()}/retrieve")
    client = HttpSearch(
        ServerAddress("", str(file)),
        timeout_s=1,
        max_attempts=1,
        max_connections=2,
        break_after=2,
        break_s=1e6,
    )
    for _ in range(3):
        with pytest.raises(SearchUnavailableError):
            client.search("x", 3)
    file.write_text("")  # another program is writing it
    with pytest.raises(SearchUnavailableError, match="not queried"):
        client.search("x", 3)
    write_address(file, server.url)
    assert client.search("x", 3) == [(LIMA, 2.5)]  # although the client had stopped querying the old address
    client.close()


@pytest.mark.parametrize(
    "text", ["", "ftp://host/x", "http://a b", "http://user:pass@host/x", "http://[", "\0"]
)
def test_a_file_without_an_address_is_refused_in_one_line(text, tmp_path):
    file = tmp_path / "url"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"search.url_file: .* allowed: an http:// or https:// address"):
        ServerAddress("", str(file))
    with pytest.raises(ConfigError, match=r"cannot read .*; start the server with --url-file"):
        ServerAddress("", str(tmp_path / "none"))


def test_server_that_is_down_fails_within_its_tries_and_comes_back():
    port = free_port()
    url = f"http://127.0.0.1:{port}/retrieve"
    client = HttpSearch(url, timeout_s=1, max_attempts=3, max_connections=2, first_wait_s=0.01, **PATIENT)
    with pytest.raises(SearchError, match=r"cannot be reached \(.*refused"):
        client.search("x", 3)
    assert client.num_retries == 2
    client.close()


def test_http_backend_is_probed_at_start():
    config = SearchConfig(
        backend="http", url=f"http://127.0.0.1:{free_port()}/retrieve", max_attempts=1, request_timeout_s=1
    )
    with pytest.raises(ConfigError, match=r"search\.url: .* cannot be reached .*; start the server"):
        build_search(config)
    tool = build_search(config, probe=False)
    with pytest.raises(SearchError):
        tool.search("x")
    tool.close()


def test_failures_are_not_remembered_and_answers_are(server):
    client = HttpSearch(
        server.url, timeout_s=2, max_attempts=2, max_connections=4, first_wait_s=0.01, **PATIENT
    )
    tool = CachedSearch(client, top_k=3)
    server.script = [b"rubbish", b"rubbish", GOOD]
    with pytest.raises(SearchError):
        tool.search("capital")
    tools = Toolset(tools={"search": Search(tool), "counts_nothing": object()})
    assert tools.take_counts() == {"search/cache_hits": 0, "search/retries": 1, "search/refused": 0}
    assert tool.search("capital") == tool.search(" capital\n") == [LIMA]
    tool.search("caf\udcff")
    assert server.requests[-1]["queries"] == ["caf?"]
    assert tools.take_counts() == {"search/cache_hits": 1, "search/retries": 0, "search/refused": 0}
    tool.close()


def test_changing_a_returned_list_does_not_change_the_cache(server):
    client = HttpSearch(server.url, timeout_s=2, max_attempts=1, max_connections=4, **PATIENT)
    tool = CachedSearch(client, top_k=3)
    tool.search("capital").clear()
    assert tool.search("capital") == [LIMA]
    tool.close()


def test_a_dead_server_is_spared_until_one_query_finds_it_back(server):
    client = HttpSearch(
        server.url,
        timeout_s=2,
        max_attempts=1,
        max_connections=4,
        break_after=3,
        break_s=0.3,
        first_wait_s=0.01,
    )
    server.script = [(503, b"")]
    for _ in range(3):
        with pytest.raises(SearchError, match="HTTP 503"):
            client.search("x", 3)
    for _ in range(5):
        with pytest.raises(SearchError, match="not queried"):
            client.search("x", 3)
    assert len(server.requests) == 3 and client.num_refused == 5
    server.script = [GOOD]
    time.sleep(0.35)
    assert client.search("x", 3) and client.search("y", 3)
    client.close()


def test_while_it_is_spared_one_query_per_pause_is_sent():
    now = [0.0]
    breaker = CircuitBreaker(break_after=2, break_s=10.0, clock=lambda: now[0])
    for _ in range(2):
        assert breaker.allows()
        breaker.failed()
    assert not breaker.allows()
    now[0] = 10.0
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    breaker.failed()
    now[0] = 19.9
    assert not breaker.allows()
    now[0] = 20.0
    assert breaker.allows()
    breaker.succeeded()
    assert all(breaker.allows() for _ in range(3))


def test_a_refused_query_does_not_count_as_silence(server):
    client = HttpSearch(
        server.url,
        timeout_s=2,
        max_attempts=1,
        max_connections=4,
        break_after=1,
        break_s=60,
        first_wait_s=0.01,
    )
    server.script = [(422, b"")]
    for _ in range(3):
        with pytest.raises(SearchError, match="HTTP 422"):
            client.search("x", 3)
    client.close()


def test_a_token_in_the_address_is_refused_without_being_shown():
    with pytest.raises(ConfigError) as caught:
        SearchConfig(backend="http", url="http://user:hunter22@127.0.0.1:1/retrieve")
    assert "hunter22" not in str(caught.value)
