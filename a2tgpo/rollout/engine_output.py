"""Plain records of the engine's outputs. Modules that use these records need not import vllm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from a2tgpo.batch.expert_rows import ExpertShape


@dataclass(frozen=True, kw_only=True)
class EngineOutput:
    """The result of a finished generation."""

    request_id: str
    tokens: list[int]
    """Sampled ids, including the ids of the stop string or of the end-of-sequence token."""
    logprobs: list[float]
    """Log p of each token in the sampling distribution, in nats. For greedy sampling, log p at temperature 1."""
    text: str
    """The decoded tokens, up to and including the stop string."""
    finish_reason: str
    """"length" if the token limit ended the generation, "stop" if a stop string or the end of sequence did."""
    stop_string: str | None
    """The stop string that ended the generation, if one did."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Number of prompt tokens that were in the prefix cache."""
    entropies: list[float] = field(default_factory=list)
    """For each token, an estimate in nats of the entropy of the distribution from which the token was sampled: the
    sum of -p log p over the `top_logprobs` most probable tokens (see `VllmEngine.submit`). Empty if `top_logprobs` is
    0."""
    experts: bytes = b""
    """The rows of experts from position `experts_from` (see `VllmEngine.submit`) to the last sampled token but one.
    Empty if the engine does not return experts, and on all ranks of an engine except the first."""


@dataclass(frozen=True, kw_only=True)
class ScoreOutput:
    """The result of scoring one answer."""

    request_id: str
    answer_logprobs: list[float]
    """Log p of each answer token given all tokens before it, in nats."""
    num_prompt_tokens: int
    """Number of tokens of prefix and answer together."""
    num_cached_tokens: int


def generation_output(output: Any, *, experts: bytes) -> EngineOutput:
    """Convert the vllm.RequestOutput of a finished generation to an `EngineOutput`."""
    sampled = output.outputs[0]
    tokens, found = list(sampled.token_ids), sampled.logprobs
    # The log-prob of the sampled token is followed by those of the most probable tokens.
    logprobs = [found.logprobs[start] for start in found.start_indices]
    assert len(tokens) == len(logprobs), "one log-prob per sampled token"
    tops = [
        found.logprobs[start + 1 : end]
        for start, end in zip(found.start_indices, found.end_indices, strict=True)
    ]
    return EngineOutput(
        request_id=output.request_id,
        tokens=tokens,
        logprobs=logprobs,
        text=sampled.text,
        finish_reason=str(sampled.finish_reason),
        stop_string=sampled.stop_reason if isinstance(sampled.stop_reason, str) else None,
        entropies=[_entropy(top) for top in tops] if any(tops) else [],
        experts=experts,
        **_prompt_counts(output),
    )


def expert_rows(output: Any, shape: ExpertShape, *, first: int) -> bytes:
    """Return the rows of experts from position `first` to the last sampled token but one.

    Raises:
        RuntimeError: if vLLM returned other positions, or rows that the model cannot have chosen.
    """
    rows, num_tokens = output.outputs[0].routed_experts, len(output.outputs[0].token_ids)
    expected = len(output.prompt_token_ids) + num_tokens - 1 - first
    found = 0 if rows is None else len(rows)
    if found != expected:
        raise RuntimeError(f"the engine returned {found} rows of experts for {expected} positions")
    try:
        return shape.encode(rows)
    except ValueError as error:
        raise RuntimeError(f"the engine returned wrong experts: {error}") from error


def score_options(tokens: Sequence[int], num_scored: int, *, is_second_runner: bool) -> dict[str, Any]:
    """Return the arguments of vllm.SamplingParams that request the log-probs for `score_output`.

    Only runner V2 can limit the log-probs to the scored tokens. V1 computes them for all uncached tokens.
    """
    if not is_second_runner:
        return dict(prompt_logprobs=0, flat_logprobs=True)
    return dict(
        prompt_logprob_token_ids=[[token] for token in tokens[-num_scored:]],
        prompt_logprob_start=len(tokens) - num_scored - 1,
    )


def score_output(output: Any, num_scored: int, *, is_second_runner: bool) -> ScoreOutput:
    """Convert the vllm.RequestOutput of a finished scoring to a `ScoreOutput`.

    Args:
        num_scored: number of tokens at the end of the request's prompt that were scored.
        is_second_runner: whether vLLM's V2 model runner computed the output. V2 uses another field for log-probs.
    """
    counts = _prompt_counts(output)
    computed_from = counts["num_prompt_tokens"] - num_scored
    assert counts["num_cached_tokens"] < computed_from, "the cache hit covers a scored row"
    if is_second_runner:
        found = output.prompt_token_id_logprobs[:, 0].tolist()
    else:
        found = output.prompt_logprobs.logprobs[-num_scored:]
    assert len(found) == num_scored, "one log-prob per token of the answer"
    return ScoreOutput(request_id=output.request_id, answer_logprobs=found, **counts)


def _entropy(logprobs: Sequence[float]) -> float:
    """Return the sum of -p log p. A token that cannot be sampled has log-prob -inf, and adds 0."""
    return -sum(math.exp(logprob) * logprob for logprob in logprobs if logprob > -math.inf)


def _prompt_counts(output: Any) -> dict[str, int]:
    return dict(
        num_prompt_tokens=len(output.prompt_token_ids or ()),
        num_cached_tokens=output.num_cached_tokens or 0,
    )
