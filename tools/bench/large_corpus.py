"""Measure the time and memory for indexing a large corpus, for starting its server, and for answering queries.

    python tools/bench/large_corpus.py --passages 1000000 [--words 100] [--keep FOLDER] [--json FILE]

The synthetic passages have words from a Zipf distribution over 200,000 words. tools/build_index.py builds the index
and tools/retrieval_server.py serves it, each in its own process. The server's memory is reported in two parts: its
own memory, and pages of mapped files, which the kernel can reclaim.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from a2tgpo.io.program import program_parser

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 200_000
QUERIES, QUERY_WORDS, TOP_K = 300, 6, 3
MIB = 2**20


def write_corpus(path: Path, *, passages: int, words: int) -> None:
    """Write `passages` passages of about `words` words to `path`. Equal arguments give equal files."""
    generator = np.random.default_rng(0)
    names = np.array([f"w{number:x}" for number in range(VOCABULARY)])
    with open(path, "w", encoding="ascii") as handle:
        for start in range(0, passages, 10_000):
            count = min(10_000, passages - start)
            drawn = names[np.minimum(generator.zipf(1.1, size=(count, words)), VOCABULARY) - 1]
            for number, row in enumerate(drawn, start=start):
                contents = f'"Passage {number}"\n' + " ".join(row)
                handle.write(json.dumps({"id": str(number), "contents": contents}) + "\n")


def build(corpus: Path, index: Path) -> dict[str, float]:
    """Build the index with tools/build_index.py. Return the seconds and the peak resident memory."""
    start = time.perf_counter()
    command = [sys.executable, "tools/build_index.py", "bm25", "--corpus", str(corpus), "--out", str(index)]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"build_s": time.perf_counter() - start, "build_peak_mib": peak}


def memory(process_id: int) -> dict[str, float]:
    """Return a process's resident memory in MiB: `own` memory, and pages that are `mapped` from files."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{process_id}/status").read_text().splitlines()
        if ":" in line
    )
    return {
        kind: int(fields[name].split()[0]) / 1024
        for kind, name in (("own", "RssAnon"), ("mapped", "RssFile"))
    }


def ask(connection: http.client.HTTPConnection, query: str) -> float:
    """Send one query to the server, and return the seconds until the answer."""
    body = json.dumps({"queries": [query], "topk": TOP_K, "return_scores": True})
    start = time.perf_counter()
    connection.request("POST", "/retrieve", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    assert answer["result"], answer
    return time.perf_counter() - start


def serve(corpus: Path, index: Path) -> dict[str, float]:
    """Start the server, and send queries one at a time.

    Return the seconds to the first answer, the latency of the other queries, and memory before and after the queries.
    """
    draw = random.Random(1)
    # Use words of medium frequency, as in real queries. The rarest words match no passage.
    queries = [
        " ".join(f"w{draw.randrange(50, 20_000):x}" for _ in range(QUERY_WORDS)) for _ in range(QUERIES)
    ]
    start = time.perf_counter()
    command = [sys.executable, "tools/retrieval_server.py", "--port", "0"]
    command += ["--corpus", str(corpus), "--index", str(index)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = urlsplit(server.stdout.readline().split()[-1])
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=600)
        ask(connection, queries[0])
        ready_s = time.perf_counter() - start
        at_start = memory(server.pid)
        milliseconds = [1000 * ask(connection, query) for query in queries[1:]]
        after = memory(server.pid)
    finally:
        server.terminate()
        server.wait(timeout=60)
    return {
        "ready_s": ready_s,
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "own_at_start_mib": at_start["own"],
        "mapped_at_start_mib": at_start["mapped"],
        "own_mib": after["own"],
        "mapped_mib": after["mapped"],
    }


def main() -> int:
    parser = program_parser(__doc__)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=100, help="of a passage")
    parser.add_argument("--keep", type=Path, help="folder of corpus and index; existing files are reused")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    if args.passages < TOP_K or args.words < 1:
        parser.error(f"--passages must be at least {TOP_K}, --words at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        corpus, index = folder / "corpus.jsonl", folder / "index"
        if not corpus.exists():
            write_corpus(corpus, passages=args.passages, words=args.words)
        found: dict[str, float] = {"passages": args.passages, "words": args.words}
        found["corpus_mib"] = corpus.stat().st_size / MIB
        if not index.exists():
            found |= build(corpus, index)
        found["index_mib"] = sum(path.stat().st_size for path in index.rglob("*") if path.is_file()) / MIB
        found["cores"] = os.cpu_count() or 1
        found |= serve(corpus, index)
    found = {name: round(value, 1) for name, value in found.items()}
    print("\n".join(f"{name:20} {value:12,.1f}" for name, value in found.items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
