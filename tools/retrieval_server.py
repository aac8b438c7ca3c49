"""Run an HTTP server that searches one corpus; requests and responses have Search-R1's format.

    python tools/retrieval_server.py --corpus FILE [--index bm25|FOLDER] [--host 127.0.0.1] [--port 8000]
        [--threads N] [--gpu] [--url-file FILE]
    python tools/retrieval_server.py --shards URL,URL,... [--token-file FILE] [--max-requests-per-s N]

POST /retrieve {"queries": [text, ...], "topk": 3, "return_scores": true} returns {"result": [[{"document":
{"id", "contents"}, "score": x}, ...], ...]}. Without return_scores, the inner lists contain the documents themselves.
GET /health returns {"status": "ok", "passages": n, "index": kind} once the index is loaded. GET /metrics returns
counts for Prometheus. GET /docs returns a description of the interface.

--index FOLDER loads a BM25 or dense index that tools/build_index.py wrote. --index bm25 builds a BM25 index in
memory. With --shards, the server passes every query to several servers, each with one part of the corpus, and merges
their results. Anyone who reaches the port can search the corpus, so the default --host listens on this machine only.
Clients need a bearer token if --token-file or A2TGPO_SEARCH_TOKEN is set. On SIGTERM, the server completes pending
requests and exits with 0. On SIGUSR1, it completes pending requests and exits with code 75, which requests a restart.
--url-file writes the server's address to a file for search.url_file.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import socket
import sys
from pathlib import Path

import httpx
import uvicorn

from a2tgpo.config.expand import path_argument, text_argument
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import START_AGAIN
from a2tgpo.io.program import exit_code
from a2tgpo.net.token import read_token
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.bound_socket import bind
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.dense import DenseServing
from a2tgpo.search.encoder import DTYPES
from a2tgpo.search.http_client import TOKEN_VARIABLE, HttpSearch
from a2tgpo.search.http_server import MAX_TOP_K, build_app
from a2tgpo.search.index_folder import SearchIndex, load_index
from a2tgpo.search.server_address import write_address
from a2tgpo.search.shards import ShardedIndex

LISTEN_BACKLOG = 4096
"""Maximum number of connections that wait to be accepted, large enough for a burst of clients."""
SHARD_TIMEOUT_S = 30.0
GRACE_S = 30
"""After a signal, the server waits at most this many seconds for pending requests."""


def open_index(options: argparse.Namespace, token: str | None) -> tuple[SearchIndex, int]:
    """Return the index that the options select, and its number of passages.

    Raises:
        ConfigError: with a one-line message, if the corpus or the index cannot be used, or if a shard does not
            answer.
    """
    if options.shards:
        return open_shards([url.strip() for url in options.shards.split(",")], token)
    if options.index != "bm25":
        serving = DenseServing(
            encoder_path=options.encoder,
            dtype=options.dtype,
            num_threads=options.threads,
            on_gpus=options.gpu,
            nprobe=options.nprobe,
        )
        return load_index(Path(options.index), Path(options.corpus), serving=serving)
    index = Bm25Index(load_corpus(options.corpus, key="--corpus"), key="--corpus")
    return index, len(index.passages)


def health_url(url: str) -> httpx.URL:
    """Return the health URL of the server that searches at `url`: `url` with "health" as its last path part."""
    return httpx.URL(url.rstrip("/")).join("health")


def open_shards(urls: list[str], token: str | None) -> tuple[ShardedIndex, int]:
    """Return an index that queries the servers at `urls`, and the number of passages of all servers.

    Raises:
        ConfigError: if a server does not answer.
    """
    num_passages = 0
    for url in urls:
        try:
            answer = httpx.get(health_url(url), trust_env=False, timeout=10).json()
            num_passages += int(answer["passages"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"--shards: {url} does not answer ({reason:.120}); start it first") from None
    clients = [
        HttpSearch(
            url,
            timeout_s=SHARD_TIMEOUT_S,
            max_attempts=3,
            max_connections=16,
            break_after=16,
            break_s=5.0,
            token=token,
        )
        for url in urls
    ]
    return ShardedIndex(clients), num_passages


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Retrieval server over one corpus, Search-R1's wire format.")
    parser.add_argument(
        "--corpus",
        type=text_argument,
        default="",
        help='JSONL of passages: id, contents ("title", newline, text)',
    )
    parser.add_argument(
        "--index",
        type=text_argument,
        default="bm25",
        help="bm25: built in memory; or a folder made by tools/build_index.py",
    )
    parser.add_argument(
        "--encoder",
        type=text_argument,
        default="",
        help="folder of a dense index's encoder, if it has moved",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the encoder; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--nprobe", type=int, default=0, help="lists of an IVF index to search; 0: as it was built"
    )
    parser.add_argument("--gpu", action="store_true", help="search a dense index on all GPUs that FAISS sees")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="threads that search; default: one per CPU that this process may use, regardless of OMP_NUM_THREADS",
    )
    parser.add_argument(
        "--shards", default="", metavar="URL,URL", help="servers to query instead of --corpus"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all addresses")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (printed)")
    parser.add_argument(
        "--url-file", type=path_argument, help="write the server's address to this file once it answers"
    )
    parser.add_argument(
        "--top-k", type=int, default=3, help="passages per query, if the request does not set a number"
    )
    parser.add_argument(
        "--token-file", type=text_argument, default="", help="file with a bearer token that clients must send"
    )
    parser.add_argument(
        "--max-requests-per-s", type=float, default=0.0, help="per client address; 0: no limit"
    )
    options = parser.parse_args()
    if bool(options.corpus) == bool(options.shards):
        parser.error("give either --corpus or --shards")
    if not 0 <= options.max_requests_per_s < 1e9:
        parser.error(f"--max-requests-per-s is {options.max_requests_per_s}; allowed: 0 or more")
    if not 0 <= options.port < 2**16:  # larger port numbers would wrap around silently
        parser.error(f"--port is {options.port}; allowed: 0 to 65535")
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; allowed: 1 or more")
    if options.nprobe < 0:
        parser.error(f"--nprobe is {options.nprobe}; allowed: 0 or more")
    if not 1 <= options.top_k <= MAX_TOP_K:
        parser.error(f"--top-k is {options.top_k}; allowed: 1 to {MAX_TOP_K}")
    return options


def main() -> int:
    return exit_code(serve, out="--url-file")


def serve() -> int:
    """Read the command line, and answer searches until a signal ends the server. Return the exit code."""
    options = parse_arguments()
    token = read_token(options.token_file, key="--token-file", variable=TOKEN_VARIABLE)
    bound = bind(options.host, options.port)
    index, num_passages = open_index(options, token)
    app = build_app(
        index,
        num_passages=num_passages,
        default_top_k=options.top_k,
        # A dense index needs 1 search thread, because the encoder and FAISS use all threads for one batch. Shards
        # get 16 threads on any machine, because these threads mostly wait.
        num_threads={"dense": 1, "shards": 16}.get(index.kind, options.threads),
        token=token,
        max_requests_per_s=options.max_requests_per_s,
    )
    bound.listen(LISTEN_BACKLOG)  # listen before the address is published, so that no client is refused
    url = address_of(bound)
    if options.url_file:
        write_address(options.url_file, url)
    print(f"{num_passages} passages, listening on {url}", flush=True)
    # uvicorn raises again the signal that ended it. Ignore this signal, because a clean end is not a failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            backlog=LISTEN_BACKLOG,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
    code = 0

    def end_to_start_again(*_: object) -> None:
        nonlocal code
        code, server.should_exit = START_AGAIN, True

    signal.signal(signal.SIGUSR1, end_to_start_again)
    server.run(sockets=[bound])
    return code


def address_of(bound: socket.socket) -> str:
    """Return the URL of the socket `bound`. If the socket listens on all addresses, the URL has this machine's
    name."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = platform.node()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/retrieve"


if __name__ == "__main__":
    sys.exit(main())
