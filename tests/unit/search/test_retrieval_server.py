import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import requests
from fastapi.testclient import TestClient

from a2tgpo.config.search import SearchConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.net.token import read_token
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.tool import build_search

SERVER = Path(__file__).parents[3] / "tools" / "retrieval_server.py"
WORDS = ["river", "capital", "Zürich", "mountain", "currency", "東京", "border", "island", "7", "queen"]
QUERIES = [
    "capital of the island",
    "zurich river",
    "東京",
    "nothing here",
    "the",
    "queen 7 border",
    "  currency\n",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(200):
            words = [WORDS[(number * step + number // 7) % len(WORDS)] for step in (1, 3, 7)]
            contents = f'"{words[0]} {number}"\nThe {words[1]} has a {words[2]}.'
            handle.write(json.dumps({"id": str(number), "contents": contents}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def url(corpus, tmp_path_factory):
    file = tmp_path_factory.mktemp("address") / "url"
    command = [sys.executable, str(SERVER), "--corpus", corpus, "--port", "0", "--url-file", str(file)]
    environment = os.environ | {"PYTHONPATH": str(SERVER.parents[1])}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        first_line = server.stdout.readline()
        assert "200 passages, listening on http://127.0.0.1:" in first_line
        address = first_line.split()[-1]
        wait_until_healthy(address.replace("/retrieve", "/health"))
        assert file.read_text() == f"{address}\n"
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) == 0


def wait_until_healthy(address):
    for _ in range(200):
        try:
            if httpx.get(address, timeout=2).json()["passages"] == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail("the server did not come up")


def test_both_backends_return_the_same_passages(corpus, url):
    local = build_search(SearchConfig(backend="bm25", corpus=corpus, top_k=5))
    remote = build_search(SearchConfig(backend="http", url=url, top_k=5))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(remote.search, QUERIES * 4))
    assert answers == [local.search(query) for query in QUERIES] * 4
    assert [len(answer) for answer in answers[:4]] == [5, 5, 5, 0]
    remote.close()


class SearchR1Client:
    """Sends requests like Search-R1's trainer: with `requests`, all queries in one body. Titles are the first
    lines.
    """

    def __init__(self, url, top_k):
        self.url, self.top_k = url, top_k

    def observations(self, queries):
        body = {"queries": queries, "topk": self.top_k, "return_scores": True}
        results = requests.post(self.url, json=body, timeout=20).json()["result"]
        return ["".join(self.line(i, hit) for i, hit in enumerate(hits, 1)) for hits in results]

    @staticmethod
    def line(rank, hit):
        title, _, text = hit["document"]["contents"].partition("\n")
        return f"Doc {rank}(Title: {title}) {text}\n"


def test_a_search_r1_client_gets_the_right_passages(corpus, url):
    """A query with a number asks for the only passage with this number in its title."""
    client = SearchR1Client(url, 3)
    with open(corpus, encoding="utf-8") as handle:
        contents = [json.loads(line)["contents"] for line in handle]
    numbers = list(range(20, 200, 9))
    for number, observation in zip(numbers, client.observations([str(n) for n in numbers]), strict=True):
        title, text = contents[number].split("\n")
        assert observation.splitlines()[0] == f"Doc 1(Title: {title}) {text}"
    assert client.observations(["nothing here"]) == [""]
    bare = requests.post(url, json={"queries": ["island"]}, timeout=20).json()["result"][0]
    assert [set(document) for document in bare] == [{"id", "contents"}] * 3


def test_scores_are_those_of_the_index_and_left_out_unless_asked_for(corpus, url):
    expected = Bm25Index(load_corpus(corpus)).search("capital river", 3)
    with_scores = httpx.post(
        url, json={"queries": ["capital river"], "topk": 3, "return_scores": True}
    ).json()
    assert [(hit["document"]["id"], hit["score"]) for hit in with_scores["result"][0]] == [
        (passage.id, score) for passage, score in expected
    ]
    without = httpx.post(url, json={"queries": ["capital river", "東京"]}).json()["result"]
    assert without[0] == [{"id": passage.id, "contents": passage.contents} for passage, _ in expected]
    assert len(without[1]) == 3


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"queries": ["a"], "topk": 101}, 422),
        ({"queries": ["a"], "topk": 0}, 422),
        ({"queries": ["a"] * 513}, 422),
        ({"queries": ["a" * 8193]}, 422),
        ({"queries": "a"}, 422),
        ({}, 422),
        ({"queries": ["a" * 8192] * 512, "x": "y" * 5_000_000}, 413),
        ({"queries": ["a"] * 512, "topk": 100}, 200),
        ({"queries": []}, 200),
    ],
)
def test_requests_past_the_limits_are_refused(url, body, status):
    assert httpx.post(url, json=body, timeout=20).status_code == status


def test_body_of_unknown_length_is_refused(url):
    assert httpx.post(url, content=(piece for piece in [b'{"queries"', b": []}"])).status_code == 413


def run_server(*arguments):
    environment = os.environ | {"PYTHONPATH": str(SERVER.parents[1])}
    done = subprocess.run(
        [sys.executable, str(SERVER), *arguments], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr


def test_bad_corpus_and_taken_port_end_in_one_line(tmp_path, corpus, url):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "1", "contents": "x"}\n{"id": "2"}\n')
    code, message = run_server("--corpus", str(bad), "--port", "0")
    assert (code, "bad.jsonl line 2: `contents` is missing" in message) == (2, True)
    port = url.rpartition(":")[2].split("/")[0]
    code, message = run_server("--corpus", corpus, "--port", port)
    assert (code, "Address already in use" in message) == (2, True)


def test_who_connects_when_it_says_so_is_answered(corpus):
    """Launch scripts wait for the line with the address and then connect."""
    command = [sys.executable, str(SERVER), "--corpus", corpus, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().split()[-1]
            assert requests.get(address.replace("/retrieve", "/health"), timeout=20).json()["status"] == "ok"
        finally:
            server.terminate()


def test_a_port_that_is_none_is_refused(corpus, monkeypatch, capsys):
    from retrieval_server import main

    # The system would use this number modulo 65536.
    monkeypatch.setattr(sys, "argv", ["retrieval_server.py", "--corpus", corpus, "--port", "99999"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and "--port is 99999; allowed: 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 300], ids=["unknown", "no name"])
def test_a_host_that_is_none_is_one_line(corpus, host, monkeypatch, capsys):
    from retrieval_server import main

    monkeypatch.setattr(sys, "argv", ["retrieval_server.py", "--corpus", corpus, "--host", host])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --host {host[:40]}")


@pytest.fixture
def guarded(corpus, tmp_path):
    """Return (client, token file) of a server that requires a token and limits the rate."""
    token_file = tmp_path / "token"
    token_file.write_text("s3cret-token\n")
    from a2tgpo.search.http_server import build_app

    app = build_app(
        Bm25Index(load_corpus(corpus)),
        num_passages=200,
        default_top_k=3,
        token=read_token(str(token_file), key="x", variable=""),
        max_requests_per_s=5,
    )
    return TestClient(app), token_file


def test_only_who_brings_the_token_may_search(guarded):
    client, _ = guarded
    body = {"queries": ["capital"]}
    assert client.get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret-token"}):
        refused = client.post("/retrieve", json=body, headers=headers)
        assert refused.status_code == 401 and "s3cret" not in refused.text
    assert (
        client.post("/retrieve", json=body, headers={"Authorization": "Bearer s3cret-token"}).status_code
        == 200
    )


def test_a_flood_is_refused_with_429(guarded):
    client, _ = guarded
    headers = {"Authorization": "Bearer s3cret-token"}
    codes = [client.post("/retrieve", json={"queries": []}, headers=headers).status_code for _ in range(20)]
    assert codes[0] == 200 and 429 in codes


def test_client_and_server_agree_on_a_token(corpus, tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text("s3cret-token\n")
    command = [
        sys.executable,
        str(SERVER),
        "--corpus",
        corpus,
        "--port",
        "0",
        "--token-file",
        str(token_file),
    ]
    environment = os.environ | {"PYTHONPATH": str(SERVER.parents[1])}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        address = server.stdout.readline().split()[-1]
        wait_until_healthy(address.replace("/retrieve", "/health"))
        with pytest.raises(ConfigError, match=r"401.*search\.token_file") as caught:
            build_search(SearchConfig(backend="http", url=address))
        assert "s3cret" not in str(caught.value)
        tool = build_search(SearchConfig(backend="http", url=address, token_file=str(token_file)))
        assert len(tool.search("capital")) == 3
        tool.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=20)


@pytest.mark.parametrize("content", ["", "short", "two words here", "schlüssel-lang"])
def test_what_is_no_token_is_refused_without_being_shown(tmp_path, content):
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(ConfigError, match="has no token") as caught:
        read_token(str(path), key="search.token_file", variable="")
    assert not content or content not in str(caught.value)
