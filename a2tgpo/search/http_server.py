"""The retrieval server's application, with Search-R1's wire format, a health check and metrics."""

from __future__ import annotations

import asyncio
import time

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, Field

from a2tgpo.search.errors import SearchError
from a2tgpo.search.index_folder import SearchIndex
from a2tgpo.search.passage import Passage
from a2tgpo.search.query_batcher import QueryBatcher
from a2tgpo.search.request_limits import RequestLimits

MAX_TOP_K = 100
MAX_QUERIES = 512
MAX_QUERY_CHARACTERS = 8192
MAX_BODY_BYTES = 8 * 2**20
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class RetrieveRequest(BaseModel):
    """Body of POST /retrieve."""

    queries: list[str] = Field(max_length=MAX_QUERIES)
    topk: int | None = Field(default=None, ge=1, le=MAX_TOP_K)
    """Number of passages per query; None: the server's `--top-k`."""
    return_scores: bool = False


class Document(BaseModel):
    id: str
    contents: str
    """The title in double quotes on the first line, and the text below it."""


class ScoredDocument(BaseModel):
    document: Document
    score: float


class RetrieveAnswer(BaseModel):
    result: list[list[ScoredDocument]] | list[list[Document]]
    """The results of each query, best first. Without `return_scores`, each result is only the document."""


class Health(BaseModel):
    status: str
    passages: int
    index: str
    """One of `bm25`, `dense`, `shards`."""


class Refusal(BaseModel):
    detail: str | list[dict]


class ServerMetrics:
    """The server's metrics, in a Prometheus registry of their own."""

    def __init__(self, *, num_passages: int):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "retrieval_requests", "Requests answered, by status.", ["status"], registry=self.registry
        )
        self.queries = Counter("retrieval_queries", "Queries in them.", registry=self.registry)
        self.cache_hits = Gauge(
            "retrieval_cache_hits", "Queries answered from memory since the start.", registry=self.registry
        )
        self.in_flight = Gauge("retrieval_requests_in_flight", "Requests under way.", registry=self.registry)
        self.seconds = Histogram(
            "retrieval_request_seconds", "Time of a request.", buckets=SECONDS, registry=self.registry
        )
        self.batch = Histogram(
            "retrieval_batch_queries",
            "Queries searched together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        Gauge("retrieval_passages", "Passages in the index.", registry=self.registry).set(num_passages)


def build_app(
    index: SearchIndex,
    *,
    num_passages: int,
    default_top_k: int,
    num_threads: int = 1,
    token: str | None = None,
    max_requests_per_s: float = 0.0,
) -> FastAPI:
    """Return the application of a server that searches `index`, with the limits of `RequestLimits`."""
    app = FastAPI(title="a2tgpo retrieval server", version="1")
    metrics = ServerMetrics(num_passages=num_passages)
    batcher = QueryBatcher(index, num_threads=num_threads, on_batch=metrics.batch.observe)
    app.add_middleware(
        RequestLimits,
        token=token,
        max_body_bytes=MAX_BODY_BYTES,
        max_requests_per_s=max_requests_per_s,
    )
    refusals: dict[int | str, dict] = {
        status: {"model": Refusal, "description": text}
        for status, text in (
            (400, "not JSON"),
            (401, "a bearer token is required"),
            (413, "the body is too large, or its length is not declared"),
            (429, "too many requests"),
            (503, "a shard gives no answer"),
        )
    }

    @app.get("/health")
    def health() -> Health:
        return Health(status="ok", passages=num_passages, index=index.kind)

    @app.get("/metrics", response_class=Response, responses={401: refusals[401], 429: refusals[429]})
    def prometheus() -> Response:
        metrics.cache_hits.set(batcher.num_hits)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/retrieve", response_model=RetrieveAnswer, responses=refusals)
    async def retrieve(request: RetrieveRequest) -> JSONResponse:
        start = time.perf_counter()
        with metrics.in_flight.track_inprogress():
            response = await answer(request)
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.seconds.observe(time.perf_counter() - start)
        return response

    async def answer(request: RetrieveRequest) -> JSONResponse:
        too_long = [i for i, query in enumerate(request.queries) if len(query) > MAX_QUERY_CHARACTERS]
        if too_long:
            detail = f"query {too_long[0]} is longer than {MAX_QUERY_CHARACTERS} characters"
            return JSONResponse({"detail": detail}, status_code=422)
        top_k = request.topk or default_top_k
        metrics.queries.inc(len(request.queries))
        # JSON can carry a lone surrogate, which no encoder accepts.
        queries = [query.encode("utf-8", "replace").decode("utf-8") for query in request.queries]
        futures = [asyncio.wrap_future(batcher.submit(query, top_k)) for query in queries]
        try:
            answers = await asyncio.gather(*futures)
        except SearchError as error:
            return JSONResponse({"detail": str(error)}, status_code=503)
        return JSONResponse(
            {"result": [[_hit(*hit, request.return_scores) for hit in hits] for hits in answers]}
        )

    app.router.add_event_handler("shutdown", batcher.close)
    return app


def _hit(passage: Passage, score: float, with_score: bool) -> dict:
    document = {"id": passage.id, "contents": passage.contents}
    return {"document": document, "score": score} if with_score else document
