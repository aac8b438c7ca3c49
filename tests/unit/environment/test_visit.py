"""The visit tool with a real HTTP server on this machine."""

import contextlib
import gzip
import http.server
import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from a2tgpo.environment.tool import ToolError
from a2tgpo.environment.tools.visit import CUT, NO_PAGE, NO_TEXT, Visit
from a2tgpo.environment.web.cassette import Cassette
from a2tgpo.environment.web.page import PageReader
from a2tgpo.environment.web.public_address import is_public
from a2tgpo.environment.web.text_extractor import TextExtractor
from a2tgpo.lifecycle.helper_process import LIMIT_SIGNALS, HelperPool, RequestFailedError

ARTICLE = (
    "<html><head><title>Lakes</title><script>track()</script></head><body><nav><a href='/'>Home</a></nav><article>"
    "<h1>Lakes of Finland</h1><p>Finland has about 188,000 lakes. The largest is Saimaa, in the south-east of the "
    "country, with a surface of 4,400 square kilometres.</p><p>In winter most of the lakes are frozen for months, "
    "and roads are built across some of them.</p></article></body></html>"
)


class Pages(http.server.BaseHTTPRequestHandler):
    """Answers by path, and records the requested paths and the Host headers."""

    asked: list
    cookies: list
    header_bytes: list

    def do_GET(self):
        self.asked.append((self.path, self.headers["Host"]))
        port = self.server.server_address[1]
        match self.path:
            case "/article":
                self.send("text/html; charset=utf-8", ARTICLE.encode())
            case "/gzip":
                self.send("text/html", gzip.compress(ARTICLE.encode()), ("Content-Encoding", "gzip"))
            case "/bomb":
                self.send("text/plain", gzip.compress(bytes(50 << 20)), ("Content-Encoding", "gzip"))
            case "/plain":
                self.send("text/plain; charset=latin-1", "Ärger".encode("latin-1"))
            case "/long":
                self.send("text/plain", b"word " * 1_000_000)
            case "/empty":
                self.send("text/html", b"")
            case "/image":
                self.send("image/png", b"PNG")
            case "/once":
                self.redirect("/article")
            case "/loop":
                self.redirect("/loop")
            case "/inside":
                self.redirect(f"http://127.0.0.2:{port}/article")
            case "/nowhere-near":
                self.redirect("http://[")
            case path if path.startswith("/charset/"):
                charset = path.rpartition("/")[2]
                self.send(f"text/plain; charset={charset}", b"\xc3\x84rger")
            case "/file":
                self.redirect("file:///etc/passwd")
            case "/slow":
                for _ in range(100):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            case "/slow-header":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                with contextlib.suppress(ConnectionError):
                    for _ in range(600):
                        self.wfile.write(b"x")
                        self.header_bytes.append(1)
                        time.sleep(0.05)
            case "/cookie":
                self.cookies.append(self.headers["Cookie"])
                self.send("text/plain", b"seen", ("Set-Cookie", "seen=1; Path=/"))
            case "/broken":
                self.send_error(503)
            case _:
                self.send_error(404)

    def send(self, content_type, body, *headers):
        self.send_response(200)
        for name, value in (("Content-Type", content_type), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client may have read enough
            self.wfile.write(body)

    def redirect(self, target):
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server():
    handler = type("Own", (Pages,), {"asked": [], "cookies": [], "header_bytes": []})
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def base(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(scope="module")
def extractor():
    pytest.importorskip("trafilatura", reason="the packages of a2tgpo[web] are not installed")
    extractor = TextExtractor()
    yield extractor
    extractor.close()


@pytest.fixture
def tool_of(extractor):
    opened = []

    def tool_of(
        is_allowed=lambda address: address == "127.0.0.1", *, timeout_s=20.0, max_chars=8000, cassette=""
    ):
        reader = PageReader(
            timeout_s=timeout_s, max_bytes=1_000_000, is_allowed=is_allowed, max_connections=4
        )
        opened.append(reader)
        cassette = Cassette(str(cassette))
        return Visit(reader=reader, extractor=extractor, cassette=cassette, max_chars=max_chars)

    yield tool_of
    for reader in opened:
        reader.close()


@pytest.mark.parametrize("path", ["/article", "/gzip", "/once"])
def test_a_page_is_answered_with_its_text_and_without_the_rest(tool_of, base, path):
    (text,) = tool_of().call(base + path)
    assert "The largest is Saimaa" in text and "roads are built" in text
    assert "track()" not in text and "Home" not in text


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/plain", "Ärger"),
        ("/empty", NO_TEXT),
        ("/image", "Error: the page is image/png, not a text"),
        ("/nowhere", "Error: the server answered HTTP 404"),
        ("/loop", "Error: the address redirects more than 5 times"),
        ("/inside", "Error: the host 127.0.0.2 is not on the public internet"),
        ("/file", "Error: this is not an address; write http://... or https://..."),
        ("/nowhere-near", "Error: the page redirects to something that is not an address"),
        *((f"/charset/{charset}", "Ärger") for charset in ("idna", "punycode", "undefined", "hex", "none")),
    ],
)
def test_what_is_wrong_with_a_page_or_an_address_is_an_answer(tool_of, base, path, answer):
    assert tool_of().call(base + path) == [answer]


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        ("saimaa", "this is not an address; write http://... or https://..."),
        ("ftp://127.0.0.1/x", "this is not an address; write http://... or https://..."),
        ("http://", "this is not an address; write http://... or https://..."),
        ("http://[::1", "this is not an address; write http://... or https://..."),
        ("http://a:b@127.0.0.1/", "the address contains a user name"),
        ("http://no-such-host.invalid/", "the host no-such-host.invalid does not exist"),
        ("http://127.0.0.1/" + "x" * 2000, "the address has more than 2000 characters"),
    ],
)
def test_what_is_no_address_is_not_requested(tool_of, url, answer):
    assert tool_of().call(url) == [f"Error: {answer}"]


def test_a_redirect_to_an_address_inside_is_refused_before_any_connection(tool_of, server, base):
    tool_of().call(base + "/inside")
    assert [path for path, _ in server.RequestHandlerClass.asked] == ["/inside"]


def test_by_default_only_public_addresses_are_visited(tool_of, server, base):
    port = server.server_address[1]
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"):
        (answer,) = tool_of(is_public).call(f"http://{host}:{port}/article")
        assert answer.startswith("Error: the host ") and "not on the public internet" in answer, answer
    assert server.RequestHandlerClass.asked == []


@pytest.mark.parametrize(
    "address",
    [
        *("10.1.2.3", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "240.0.0.1", "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "2002:7f00:1::"),
        *("64:ff9b::7f00:1", "168.63.129.16", "192.0.0.192", "fec0::1", "::ffff:168.63.129.16"),
    ],
)
def test_no_private_address_counts_as_public(address):
    assert not is_public(address)
    assert is_public("8.8.8.8") and is_public("2606:4700::1111") and is_public("::ffff:8.8.8.8")


def test_the_connection_goes_to_the_address_that_was_checked(tool_of, server, monkeypatch):
    """The address does not change if a name server returns another address at its second look-up."""
    port, real, looked_up = server.server_address[1], socket.getaddrinfo, []

    def look_up(host, *args, **kwargs):
        if host == "page.example":
            looked_up.append(host)
            return real("127.0.0.1" if len(looked_up) == 1 else "127.0.0.2", *args, **kwargs)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    (text,) = tool_of().call(f"http://page.example:{port}/article#lakes")
    assert "Saimaa" in text
    assert looked_up == ["page.example"]
    assert server.RequestHandlerClass.asked == [("/article", f"page.example:{port}")]


def test_a_server_that_does_not_answer_fails_the_call_in_time(tool_of, base):
    with pytest.raises(ToolError, match=r"^the server answered HTTP 503$"):
        tool_of().call(base + "/broken")
    tool = tool_of(timeout_s=0.3)
    with pytest.raises(ToolError, match=r"^the page did not arrive within 0\.3 s$|cannot be reached"):
        tool.call(base + "/slow")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ToolError, match="the server cannot be reached"):
        tool.call(f"http://127.0.0.1:{port}/")


def test_a_header_that_arrives_byte_by_byte_fails_the_call_in_time(tool_of, server, base):
    with pytest.raises(ToolError, match=r"^the page did not arrive within 0\.5 s$"):
        tool_of(timeout_s=0.5).call(base + "/slow-header")
    assert len(server.RequestHandlerClass.header_bytes) < 600, "the call waited for the whole header"


def test_a_page_is_read_without_the_cookies_of_earlier_calls(tool_of, server, base):
    tool = tool_of()
    tool.call(base + "/cookie")
    tool.call(base + "/cookie")
    assert server.RequestHandlerClass.cookies == [None, None]


def test_long_pages_and_compressed_bombs_are_cut(tool_of, base):
    (text,) = tool_of(max_chars=100).call(base + "/long")
    assert len(text) < 150 and text.endswith(CUT)
    (bomb,) = tool_of().call(base + "/bomb")
    assert len(bomb) < 9000


def extracted(page: str, **changes) -> subprocess.CompletedProcess:
    """Run a helper with `changes` to its module on a page. The helper prints "null" when it is ready, and then its
    answer.
    """
    program = f"""
from a2tgpo.environment.web import page_text
from a2tgpo.lifecycle.helper_process import serve
vars(page_text).update({changes})
serve(page_text.main_text, example=("", "", False), cpu_s=page_text.EXTRACT_S, longest_s=60)
"""
    request = json.dumps([page, "http://page.example", False]) + "\n"
    return subprocess.run([sys.executable, "-c", program], input=request, stdout=subprocess.PIPE, text=True)


def test_a_page_that_takes_too_long_ends_its_process(extractor):
    done = extracted("<p>word word</p>" * 50_000, EXTRACT_S=0.1)
    assert done.stdout == "null\n" and -done.returncode in LIMIT_SIGNALS
    done = extracted("<p>word word</p>" * 50, EXTRACT_S=60)
    assert "word word" in done.stdout and done.returncode == 0


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (TimeoutError, "the page takes too long to read"),
        (RequestFailedError, "the page cannot be parsed"),
    ],
)
def test_a_page_that_the_extractor_gives_up_is_an_answer(tool_of, base, error, answer, monkeypatch):
    def give_up(*_):
        raise error

    monkeypatch.setattr(HelperPool, "ask", give_up)
    assert tool_of().call(base + "/article") == [f"Error: {answer}"]


def test_recorded_pages_are_answered_without_the_server(tool_of, server, base, tmp_path):
    tool = tool_of(cassette=tmp_path)
    urls = [base + "/article", base + "/nowhere"]
    answers = [tool.call(url) for url in urls]
    assert tool.take_counts() == {"requests": 2}
    server.RequestHandlerClass.asked.clear()
    recorded = Visit(reader=None, extractor=None, cassette=Cassette(str(tmp_path)), max_chars=8000)
    assert [recorded.call(url) for url in urls] == answers
    assert [tool.call(url) for url in urls] == answers
    assert recorded.call(base + "/plain") == [NO_PAGE]
    assert recorded.take_counts() == {"recorded": 2, "cassette_misses": 1}
    assert server.RequestHandlerClass.asked == []
