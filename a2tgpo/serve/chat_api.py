"""The agent's OpenAI-compatible endpoint, with POST /v1/chat/completions, GET /v1/models and GET /health."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from a2tgpo.protocol.protocol import AgentProtocol
from a2tgpo.search.request_limits import RequestLimits
from a2tgpo.serve.inbox import Inbox, InboxClosedError, InboxFullError, Order, Played
from a2tgpo.trajectory import Prompt

MAX_BODY_BYTES = 2**20
RETRY_AFTER_S = 5


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: str
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. A body with a field that is not listed here is refused."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Message] = Field(min_length=1)
    model: str = ""
    temperature: float | None = None
    """The sampling temperature: 0 (greedy) or the temperature of training. None: the temperature of training."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    user: str | None = None


class BadRequestError(Exception):
    """Raised if a request is invalid. The client receives the message, which is one line."""


def build_app(
    inbox: Inbox,
    protocol: AgentProtocol,
    *,
    name: str,
    temperature: float,
    max_prompt_tokens: int,
    token: str | None = None,
) -> FastAPI:
    """Build the endpoint, which puts each question into `inbox` and answers with the result.

    Args:
        protocol: renders a question as the tokens of a prompt, and finds the answer in a response.
        name: the name of the model.
        temperature: the temperature of training (`rollout.temperature`).
        max_prompt_tokens: largest number of tokens in a prompt (`data.max_prompt_tokens`).
        token: the bearer token that clients must send. None: clients need no token.
    """
    app = FastAPI(title="a2tgpo agent", version="1")
    app.add_middleware(RequestLimits, token=token, max_body_bytes=MAX_BODY_BYTES, max_requests_per_s=0.0)

    @app.exception_handler(RequestValidationError)
    async def refuse(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _error(400, f"{where}: {first['msg']}" if where else str(first["msg"]))

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": len(inbox)}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "a2tgpo"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> JSONResponse:
        try:
            order = await asyncio.to_thread(_order, request, protocol, temperature, max_prompt_tokens)
            played = await asyncio.wrap_future(inbox.put(order))
        except BadRequestError as error:
            return _error(400, str(error))
        except InboxFullError:
            return _error(429, "too many questions are waiting; try again later")
        except InboxClosedError:
            return _error(503, "the server is shutting down")
        return JSONResponse(_completion(played, protocol, name))

    return app


def _order(
    request: ChatRequest, protocol: AgentProtocol, temperature: float, max_prompt_tokens: int
) -> Order:
    """Return what the agent is to do for a request. Raise BadRequestError if the agent cannot fulfil the request."""
    if [message.role for message in request.messages] != ["user"]:
        raise BadRequestError(
            "messages: give one message of role user; the agent has its own instructions and remembers nothing"
        )
    if request.temperature not in (None, 0.0, temperature):
        raise BadRequestError(f"temperature is {request.temperature}; allowed: 0 or {temperature:g}")
    question = request.messages[0].text.encode("utf-8", "replace").decode().strip()
    if not question:
        raise BadRequestError("messages: the question is empty")
    tokens = protocol.template.render(question)
    if len(tokens) > max_prompt_tokens:
        raise BadRequestError(f"the prompt has {len(tokens)} tokens; allowed: at most {max_prompt_tokens}")
    # Requests with the same seed get the same random draws, whatever other requests run at the same time. A request
    # without a seed gets a random seed.
    seed = secrets.randbits(32) if request.seed is None else request.seed
    prompt = Prompt(index=0, id=f"chat-{seed}", question=question, answers=(), tokens=tokens)
    return Order(prompt=prompt, is_greedy=request.temperature == 0)


def _completion(played: Played, protocol: AgentProtocol, name: str) -> dict[str, Any]:
    trajectory, texts = played.trajectory, played.texts
    answer = protocol.format.answer_of(trajectory, texts)
    turns = [
        {
            "text": text,
            "calls": [
                {"tool": call.tool, "arguments": call.arguments, "failed": call.failed} for call in turn.calls
            ],
            "tool": turn.tool,
            "query": turn.query,
            "observation": str(protocol.tokenizer.decode(turn.observation_tokens.tolist())) or None,
            "tool_failed": turn.tool_failed,
        }
        for turn, text in zip(trajectory.turns, texts, strict=True)
    ]
    num_sampled = sum(len(turn.tokens) for turn in trajectory.turns)
    num_prompt = len(trajectory.prompt_tokens)
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": (answer or "").strip()},
                "finish_reason": "stop" if answer is not None else "length",
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_sampled,
            "total_tokens": num_prompt + num_sampled,
        },
        "agent": {"turns": turns, "stop_reason": trajectory.stop_reason},
    }


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status == 400 else "server_error"
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status, headers=headers)
