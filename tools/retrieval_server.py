"""Retrieval server over one corpus, Search-R1's wire format.

    python tools/retrieval_server.py --corpus FILE [--index bm25] [--host 127.0.0.1] [--port 8000] [--token-file FILE]

POST /retrieve {"queries": [text, ...], "topk": 3, "return_scores": true} answers {"result": [[{"document":
{"id", "contents"}, "score": x}, ...], ...]}, or with return_scores false (the default, as in Search-R1) the
documents themselves. GET /health answers {"status": "ok", "passages": n} once the index is built. Anyone
who reaches the port can search the corpus: it listens on this machine only unless --host says otherwise, and asks
for a bearer token where --token-file or A2TGPO_SEARCH_TOKEN gives one.
"""

import argparse
import socket
import sys

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from a2tgpo.config.check import ConfigError
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.passage import Passage
from a2tgpo.search.request_limits import RequestLimits
from a2tgpo.search.token import read_token

MAX_TOP_K = 100
MAX_QUERIES = 512
MAX_QUERY_CHARACTERS = 8192
MAX_BODY_BYTES = 8 * 2**20


class RetrieveRequest(BaseModel):
    """Body of POST /retrieve."""

    queries: list[str] = Field(max_length=MAX_QUERIES)
    topk: int | None = Field(default=None, ge=1, le=MAX_TOP_K)
    """None: the server's --top-k."""
    return_scores: bool = False


def build_app(
    index: Bm25Index, *, default_top_k: int, token: str | None = None, max_requests_per_s: float = 0.0
) -> FastAPI:
    """The server over `index`; see `RequestLimits` for `token` and `max_requests_per_s`."""
    app = FastAPI(title="a2tgpo retrieval server")

    app.add_middleware(
        RequestLimits,  # type: ignore[arg-type]
        token=token,
        max_body_bytes=MAX_BODY_BYTES,
        max_requests_per_s=max_requests_per_s,
    )

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok", "passages": len(index.passages)}

    # A plain function: FastAPI runs it in a thread, so one long batch does not hold up the others.
    @app.post("/retrieve")
    def retrieve(request: RetrieveRequest) -> JSONResponse:
        too_long = [i for i, query in enumerate(request.queries) if len(query) > MAX_QUERY_CHARACTERS]
        if too_long:
            detail = f"query {too_long[0]} is longer than {MAX_QUERY_CHARACTERS} characters"
            return JSONResponse({"detail": detail}, status_code=422)
        top_k = request.topk or default_top_k
        result: list[list[dict]] = []
        for query in request.queries:
            hits = index.search(query, top_k)
            if request.return_scores:
                result.append([{"document": _document(passage), "score": score} for passage, score in hits])
            else:
                result.append([_document(passage) for passage, _ in hits])
        return JSONResponse({"result": result})

    return app


def _document(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "contents": passage.contents}


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is one clear line before the index is built."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        where = f"--host {host} --port {port}"
        raise ConfigError(f"{where}: cannot listen there ({reason}); choose another port") from None
    return bound


def main() -> int:
    parser = argparse.ArgumentParser(description="Retrieval server over one corpus, Search-R1's wire format.")
    parser.add_argument(
        "--corpus", required=True, help='JSONL of passages: id, contents ("title", newline, text)'
    )
    parser.add_argument("--index", choices=["bm25"], default="bm25")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all addresses")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (printed)")
    parser.add_argument("--top-k", type=int, default=3, help="passages where the request does not say")
    parser.add_argument("--token-file", default="", help="file with a bearer token that clients must send")
    parser.add_argument(
        "--max-requests-per-s", type=float, default=0.0, help="of one client address; 0: no limit"
    )
    options = parser.parse_args()
    if not 0 <= options.max_requests_per_s < 1e9:
        parser.error(f"--max-requests-per-s is {options.max_requests_per_s}; allowed: 0 or more")
    if not 1 <= options.top_k <= MAX_TOP_K:
        parser.error(f"--top-k is {options.top_k}; allowed: 1 to {MAX_TOP_K}")
    try:
        token = read_token(options.token_file, key="--token-file")
        bound = _listen(options.host, options.port)
        index = Bm25Index(load_corpus(options.corpus, key="--corpus"))
    except ConfigError as error:
        print(f"retrieval_server: {error}", file=sys.stderr)
        return 2
    host, port = bound.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(f"{len(index.passages)} passages, listening on http://{address}:{port}/retrieve", flush=True)
    app = build_app(
        index, default_top_k=options.top_k, token=token, max_requests_per_s=options.max_requests_per_s
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[bound])
    return 0


if __name__ == "__main__":
    sys.exit(main())
