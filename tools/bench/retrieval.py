"""Measure a retrieval server's throughput and latency by number of clients, and check every answer.

    python tools/bench/retrieval.py URL --questions FILE [--clients 1,8,80] [--seconds 5] [--topk 3] [--json FILE]

The clients use Python's own http.client, so that client and server share no project code. Before the load begins, the
bench sends the queries one at a time to get the expected answers. The query cache makes repeated queries cheap, so
each request of the load has a new query. --repeat repeats queries.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np


@dataclass
class Outcome:
    """The measurements with one number of clients."""

    clients: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: int = 0
    """Number of requests that were refused, were interrupted, or had no answer within the time limit."""

    def describe(self) -> dict[str, float]:
        milliseconds = np.array(self.latencies) * 1000
        return {
            "clients": self.clients,
            "requests": len(self.latencies),
            "requests_per_s": round(len(self.latencies) / self.seconds, 1),
            "p50_ms": round(float(np.percentile(milliseconds, 50)), 1),
            "p99_ms": round(float(np.percentile(milliseconds, 99)), 1),
            "wrong": self.wrong,
            "lost": self.lost,
        }


class Client:
    """A client with one connection, which stays open between requests."""

    def __init__(self, url: str, timeout_s: float = 60.0):
        parts = urlsplit(url)
        self._path = parts.path
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)

    def retrieve(self, queries: Sequence[str], top_k: int) -> list:
        """Send one request, and return the `result` of its response. Raise OSError or ValueError if that fails."""
        body = json.dumps({"queries": list(queries), "topk": top_k, "return_scores": True})
        try:
            self._connection.request("POST", self._path, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            content = response.read()
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
        if response.status != 200:
            raise OSError(f"HTTP {response.status}")
        return json.loads(content)["result"]

    def close(self) -> None:
        self._connection.close()


def load(url: str, cases: Sequence[tuple[str, list]], *, clients: int, seconds: float, top_k: int) -> Outcome:
    """Send `cases`, pairs of a query and its expected hits, over `clients` concurrent connections."""
    outcome, lock = Outcome(clients=clients), threading.Lock()
    turns: Iterator[tuple[str, list]] = itertools.cycle(cases)
    start = time.perf_counter()

    def work() -> None:
        client = Client(url)
        while time.perf_counter() - start < seconds:
            with lock:
                query, right = next(turns)
            begin = time.perf_counter()
            try:
                (hits,) = client.retrieve([query], top_k)
            except (OSError, ValueError):
                with lock:
                    outcome.lost += 1
                client.close()
                continue
            with lock:
                outcome.latencies.append(time.perf_counter() - begin)
                outcome.wrong += hits != right
        client.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome.seconds = time.perf_counter() - start
    return outcome


def right_answers(url: str, queries: Sequence[str], top_k: int) -> list[tuple[str, list]]:
    """Send the queries one at a time, and return pairs of a query and its hits."""
    client = Client(url)
    cases = [(query, client.retrieve([query], top_k)[0]) for query in queries]
    client.close()
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="the endpoint, e.g. http://127.0.0.1:8000/retrieve")
    parser.add_argument("--questions", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--clients", default="1,8,80", help="connections at once, level by level")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each level")
    parser.add_argument("--topk", type=int, default=3)
    parser.add_argument("--repeat", action="store_true", help="repeat the same queries")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    try:
        lines = args.questions.read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line)["question"] for line in lines if line.strip()]
        if not questions:
            raise ValueError("no question in it")
        cases = right_answers(args.url, questions[:200], args.topk)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.questions} or {args.url} cannot be used ({error})", file=sys.stderr)
        return 2
    if not args.repeat:
        # Exclamation marks make a query new to the cache. BM25 ignores them, so it still finds the same passages.
        marks = ("!" * i for i in range(1, 400))
        cases = [(f"{query} {mark}", right) for mark in marks for query, right in cases]
    table = []
    for clients in map(int, args.clients.split(",")):
        row = load(args.url, cases, clients=clients, seconds=args.seconds, top_k=args.topk).describe()
        table.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row["wrong"] or row["lost"] for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
