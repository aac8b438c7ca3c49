"""The retrieval service under load and in parts, and compared with its own OpenAPI description."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from retrieval import load, right_answers

from a2tgpo.search.answer_cache import AnswerCache
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.errors import SearchError
from a2tgpo.search.http_server import build_app
from a2tgpo.search.index_build import build_bm25
from a2tgpo.search.passage import Passage
from a2tgpo.search.query_batcher import QueryBatcher

ROOT = Path(__file__).parents[3]

WORDS = ["river", "capital", "Zürich", "mountain", "currency", "東京", "border", "island", "7", "queen"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(2000):
            words = [WORDS[(number * step + number // 7) % len(WORDS)] for step in (1, 3, 7)]
            contents = f'"{words[0]} {number}"\nThe {words[1]} has a {words[2]} {number % 97}.'
            handle.write(json.dumps({"id": str(number), "contents": contents}) + "\n")
    return path


@contextmanager
def served(*arguments):
    """Start a server, and yield its process and endpoint."""
    command = [sys.executable, "tools/retrieval_server.py", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        line = process.stdout.readline()
        assert "listening on" in line, process.stderr.read()
        url = line.split()[-1]
        for _ in range(200):
            try:
                httpx.get(url.replace("/retrieve", "/health"), timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(corpus):
    with served("--corpus", corpus) as (process, url):
        yield url
        process.send_signal(signal.SIGUSR1)  # as at the end of a job's time
        assert process.wait(timeout=30) == 75


def test_ten_times_as_many_clients_lose_nothing_and_get_right_answers(url):
    queries = [f"{WORDS[i % 10]} {WORDS[(i * 3 + 1) % 10]} {i % 97}" for i in range(60)]
    cases = right_answers(url, queries, 3)
    fresh = [(f"{query} {'!' * i}", right) for i in range(1, 30) for query, right in cases]
    for clients in (8, 80):
        outcome = load(url, fresh, clients=clients, seconds=1.5, top_k=3)
        assert (outcome.lost, outcome.wrong) == (0, 0) and len(outcome.latencies) >= clients


def test_the_bench_of_large_corpora_builds_serves_and_counts(tmp_path, monkeypatch):
    import large_corpus

    out = tmp_path / "found.json"
    arguments = ["--passages", "3000", "--words", "60", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["large_corpus.py", *arguments])
    assert large_corpus.main() == 0
    found = json.loads(out.read_text())
    assert found["passages"] == 3000 and found["own_mib"] > 10 and found["p99_ms"] >= found["p50_ms"] > 0


def test_the_same_query_of_many_clients_is_remembered_and_counted(url):
    def metric(name):
        text = httpx.get(url.replace("/retrieve", "/metrics")).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    before = metric("retrieval_cache_hits"), metric("retrieval_requests_total")
    for _ in range(5):
        httpx.post(url, json={"queries": ["island queen", "river"], "topk": 2})
    assert metric("retrieval_cache_hits") - before[0] >= 8
    assert metric("retrieval_requests_total") - before[1] == 5
    assert metric("retrieval_passages") == 2000
    assert metric("retrieval_request_seconds_count") >= 5 and metric("retrieval_batch_queries_count") >= 1


def test_a_stop_lets_requests_under_way_end(corpus):
    with served("--corpus", corpus) as (process, url):
        answers = []

        def ask(number):
            queries = [f"{word} {number} {i}" for i in range(50) for word in WORDS]
            answers.append(httpx.post(url, json={"queries": queries}, timeout=60).status_code)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        health = url.replace("/retrieve", "/metrics")
        for _ in range(200):
            if "retrieval_requests_in_flight 4.0" in httpx.get(health).text or len(answers) == 4:
                break
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert answers == [200] * 4
        assert process.wait(timeout=30) == 0


def test_parts_on_several_servers_answer_nearly_as_one_and_a_dead_one_is_told(corpus, tmp_path):
    for part in range(2):
        build_bm25(corpus, tmp_path / f"part-{part}", part=(part, 2))
    first = served("--corpus", corpus, "--index", tmp_path / "part-0")
    second = served("--corpus", corpus, "--index", tmp_path / "part-1")
    with first as (_, one), second as (process, two), served("--shards", f"{one},{two}") as (_, front):
        health = httpx.get(front.replace("/retrieve", "/health")).json()
        assert health == {"status": "ok", "passages": 2000, "index": "shards"}
        whole = Bm25Index(load_corpus(str(corpus)))
        queries = ["queen island 13", "Zürich 96", "currency border", "nothing at all"]
        body = {"queries": queries, "topk": 5, "return_scores": True}
        for query, hits in zip(queries, httpx.post(front, json=body).json()["result"], strict=True):
            expected = whole.search(query, 5)
            assert len(hits) == len(expected)
            assert [hit["score"] for hit in hits] == pytest.approx([s for _, s in expected], rel=0.05)
            assert hits == sorted(hits, key=lambda hit: -hit["score"])
        process.kill()
        process.wait()
        answer = httpx.post(front, json={"queries": ["another query"]}, timeout=60)
        assert answer.status_code == 503 and two in answer.json()["detail"]
        command = [sys.executable, "tools/retrieval_server.py", "--port", "0", "--shards", f"{one},{two}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "does not answer" in done.stderr


def test_an_index_over_another_corpus_is_refused(corpus, tmp_path):
    build_bm25(corpus, tmp_path / "index")
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": 1, "contents": "a"}\n')
    command = [sys.executable, "tools/retrieval_server.py", "--port", "0"]
    command += ["--corpus", str(other), "--index", str(tmp_path / "index")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "was built over another corpus" in done.stderr
    assert done.stderr.count("\n") == 1


class SlowIndex:
    """A slow index that answers with the query itself and records its batches."""

    kind = "bm25"

    def __init__(self):
        self.batches = []

    def search_many(self, queries, top_k):
        self.batches.append(list(queries))
        time.sleep(0.05)
        if "boom" in queries:
            raise SearchError("no answer")
        return [self.answer(query, top_k) for query in queries]

    @staticmethod
    def answer(query, top_k):
        return [(Passage(query, "", ""), float(top_k))]


def test_waiting_queries_are_searched_together_and_equal_ones_once():
    index = SlowIndex()
    cache = AnswerCache(2**20)
    cache.put("q0", 2, index.answer("q0", 2))
    batcher = QueryBatcher(index, num_threads=1, max_batch=4, cache_bytes=3 * cache.num_bytes)
    futures = [batcher.submit(f"q{i % 5}", 2) for i in range(10)]
    assert [future.result()[0][0].id for future in futures] == [f"q{i % 5}" for i in range(10)]
    assert all(len(batch) == len(set(batch)) <= 4 for batch in index.batches) and len(index.batches) <= 4
    # The cache keeps three answers. Another top_k is another answer.
    assert batcher.submit("q4", 2).result() == index.answer("q4", 2) and batcher.num_hits == 1
    assert batcher.submit("q4", 3).result() == index.answer("q4", 3) and batcher.num_hits == 1
    with pytest.raises(SearchError, match="no answer"):
        batcher.submit("boom", 2).result()
    assert batcher.submit("q7", 2).result() == index.answer("q7", 2)
    last = [batcher.submit(f"z{i}", 1) for i in range(9)]
    batcher.close()
    assert [future.result(timeout=0)[0][0].id for future in last] == [f"z{i}" for i in range(9)]


def test_the_interface_is_as_it_describes_itself(corpus):
    """Requests are generated from the OpenAPI description. None crashes the server or gets an undescribed answer."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    passages = load_corpus(str(corpus))[:50]
    app = build_app(Bm25Index(passages), num_passages=50, default_top_k=3)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
    tried = set()

    def check(operation):
        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def run(case):
            case.call_and_validate(checks=checks)
            tried.add(operation.label)

        run()

    for result in schema.get_all_operations():
        check(result.ok())
    assert tried == {"GET /health", "GET /metrics", "POST /retrieve"}
