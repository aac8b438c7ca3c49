"""The engine's outputs as plain records, so that the event loop need not import the engine."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineOutput:
    """A finished generation."""

    request_id: str
    tokens: list[int]
    """Sampled ids, including those of the stop string or the end-of-sequence token."""
    logprobs: list[float]
    """log p of each token in the distribution from which it was sampled, nats; greedy: at temperature 1."""
    text: str
    """The tokens' text, cut right after the stop string."""
    finish_reason: str
    """stop (a stop string or the end of sequence) | length."""
    stop_string: str | None
    """The stop string that ended the generation."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache."""


@dataclass(frozen=True, kw_only=True)
class ScoreOutput:
    """A finished scoring of an answer."""

    request_id: str
    answer_logprobs: list[float]
    """log p of each answer token given all tokens before it, nats."""
    num_prompt_tokens: int
    """Prefix and answer together."""
    num_cached_tokens: int


def generation_output(output: Any) -> EngineOutput:
    """Convert a finished generation (vllm.RequestOutput) to an `EngineOutput`."""
    sampled = output.outputs[0]
    tokens, logprobs = list(sampled.token_ids), list(sampled.logprobs.logprobs)
    assert len(tokens) == len(logprobs), "one log-prob per sampled token"
    return EngineOutput(
        request_id=output.request_id,
        tokens=tokens,
        logprobs=logprobs,
        text=sampled.text,
        finish_reason=str(sampled.finish_reason),
        stop_string=sampled.stop_reason if isinstance(sampled.stop_reason, str) else None,
        **_prompt_counts(output),
    )


def score_output(output: Any, num_scored: int, *, is_second_runner: bool) -> ScoreOutput:
    """Convert a finished scoring (vllm.RequestOutput) of the last `num_scored` prompt tokens to a `ScoreOutput`.

    Args:
        is_second_runner: whether vLLM's V2 model runner computed it; V2 returns log-probs in another field.
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


def _prompt_counts(output: Any) -> dict[str, int]:
    return dict(
        num_prompt_tokens=len(output.prompt_token_ids or ()),
        num_cached_tokens=output.num_cached_tokens or 0,
    )
