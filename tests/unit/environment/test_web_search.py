"""The web_search tool with stubs of its services, over real HTTP."""

import http.server
import json
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from a2tgpo.config.load import load_config
from a2tgpo.config.web import WebConfig
from a2tgpo.environment.tool import ToolError, ToolUnavailableError, build_tools
from a2tgpo.environment.tools.web_search import NO_RESULT, WebSearch
from a2tgpo.environment.web.cassette import Cassette
from a2tgpo.environment.web.search_service import SearchService
from a2tgpo.io.errors import ConfigError

ROOT = Path(__file__).parents[3]
KEY = "a-secret-key"
HITS = [(f"Title {rank}", f"https://page{rank}.example/", f"text\n {rank}") for rank in range(1, 8)]


class Service(http.server.BaseHTTPRequestHandler):
    """Answers like Serper at POST /search and like SearXNG at GET /search, after the error statuses that the test
    requests.
    """

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["X-API-KEY"]
        self.answer(body["q"], ("POST", self.path, body, key), "organic", ("title", "link", "snippet"))

    def do_GET(self):
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        path = urlsplit(self.path).path
        self.answer(query["q"], ("GET", path, query, None), "results", ("title", "url", "content"))

    def answer(self, query, asked, field, names):
        self.server.asked.append(asked)
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        hits = [] if query == "nothing" else [dict(zip(names, hit, strict=True)) for hit in HITS]
        body = self.server.body or json.dumps({field: hits}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.asked, server.statuses, server.body = [], [], b""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tool_of(server):
    opened = []

    def tool_of(backend, **settings):
        base = f"http://127.0.0.1:{server.server_address[1]}"
        url = {"serper": f"{base}/search", "searxng": f"{base}/"}.get(backend, "")
        config = WebConfig(backend=backend, url=url, top_k=2, **settings)
        service = None
        if backend != "recorded":
            service = SearchService(config, token=KEY, max_connections=2, first_wait_s=0.001)
        opened.append(WebSearch(config, service=service, cassette=Cassette(config.cassette)))
        return opened[-1]

    yield tool_of
    for tool in opened:
        tool.close()


@pytest.mark.parametrize(
    ("backend", "request_"),
    [
        ("serper", ("POST", "/search", {"q": "lakes of Finland", "num": 2}, KEY)),
        ("searxng", ("GET", "/search", {"q": "lakes of Finland", "format": "json"}, None)),
    ],
)
def test_results_of_each_service_are_answered_alike(tool_of, server, backend, request_):
    tool = tool_of(backend)
    assert tool.call("lakes of\nFinland") == [
        "1. Title 1 (https://page1.example/)\ntext 1",
        "2. Title 2 (https://page2.example/)\ntext 2",
    ]
    assert tool.call("nothing") == [NO_RESULT]
    assert server.asked[0] == request_
    assert tool.take_counts() == {"requests": 2, "retries": 0}


@pytest.mark.parametrize("backend", ["serper", "searxng"])
def test_a_failure_that_passes_is_retried(tool_of, server, backend):
    server.statuses = [500, 429]
    tool = tool_of(backend)
    assert len(tool.call("q")) == 2
    assert len(server.asked) == 3 and tool.take_counts() == {"requests": 1, "retries": 2}


@pytest.mark.parametrize(
    ("status", "kind", "num_asked", "says"),
    [
        (400, ToolError, 1, "answered HTTP 400"),
        (403, ToolUnavailableError, 1, "answered HTTP 403 Forbidden; check web.token_file"),
        (503, ToolUnavailableError, 3, "answered HTTP 503"),
    ],
)
def test_a_failure_says_whether_other_queries_fail_too(tool_of, server, status, kind, num_asked, says):
    server.statuses = [status] * 9
    with pytest.raises(ToolError) as caught:
        tool_of("serper").call("q")
    assert type(caught.value) is kind or kind is ToolUnavailableError
    assert isinstance(caught.value, ToolUnavailableError) == (kind is ToolUnavailableError)
    assert says in str(caught.value) and KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.asked) == num_asked


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"organic": [{"title": 1}]}', b'{"organic": 3}'])
def test_an_answer_that_cannot_be_read_is_a_failure_in_one_line(tool_of, server, body):
    server.body = body
    with pytest.raises(ToolUnavailableError, match=r"sent an unusable answer"):
        tool_of("serper").call("q")


def test_a_service_that_is_gone_is_unavailable(tool_of, server):
    tool = tool_of("serper", request_timeout_s=1.0)
    server.shutdown()
    server.server_close()
    with pytest.raises(ToolUnavailableError, match=r"cannot be reached|did not answer"):
        tool.call("q")


def test_recorded_answers_are_the_same_without_the_service(tool_of, server, tmp_path):
    queries = ["lakes", "nothing", "ÄLTESTE  Stadt"]
    answers = [tool_of("searxng", cassette=str(tmp_path)).call(query) for query in queries]
    assert len(server.asked) == 3
    again = tool_of("serper", cassette=str(tmp_path))
    assert [again.call(query) for query in queries] == answers
    recorded = tool_of("recorded", cassette=str(tmp_path))
    assert [recorded.call(query.casefold()) for query in queries] == answers
    assert len(server.asked) == 3
    assert recorded.call("new") == [NO_RESULT]
    assert recorded.take_counts() == {"recorded": 3, "cassette_misses": 1}
    assert again.take_counts() == {"recorded": 3, "retries": 0}


def test_a_cassette_that_cannot_be_written_is_warned_about_once(tool_of, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tool = tool_of("searxng", cassette=str(tmp_path / "file"))
    for query in ("a", "b"):
        assert len(tool.call(query)) == 2
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("warning: web.cassette: ")


def test_a_torn_recording_is_asked_for_again(tool_of, server, tmp_path):
    tool = tool_of("searxng", cassette=str(tmp_path))
    answer = tool.call("a")
    for file in tmp_path.rglob("*.json"):
        file.write_text(file.read_text()[:20])
    assert tool.call("a") == answer and len(server.asked) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["web.backend=searxng"],
            "web.url is ''; allowed: an http:// or https:// address, with web.backend=searxng",
        ),
        (["web.backend=recorded"], "web.cassette is ''; allowed: a folder, with web.backend=recorded"),
        (["web.url=serper.dev"], "web.url is 'serper.dev'; allowed: an http"),
        (
            ["web.max_attempts=99"],
            "tools.call_timeout_s is 240.0; allowed: >= 2772, the longest time that a call of",
        ),
        (
            [],
            "the tool web_search needs a key with web.backend=serper: web.token_file, or A2TGPO_WEB_TOKEN in the",
        ),
    ],
)
def test_a_service_that_cannot_work_is_refused_in_one_line(monkeypatch, settings, says):
    monkeypatch.delenv("A2TGPO_WEB_TOKEN", raising=False)
    with pytest.raises(ConfigError) as caught:
        build_tools(
            load_config(ROOT / "configs" / "quickstart.yaml", ["tools.names=[web_search]", *settings])
        )
    assert says in str(caught.value)
