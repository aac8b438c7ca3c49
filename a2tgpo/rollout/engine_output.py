"""What the engine gives back; plain records, so that the event loop needs no engine to be imported."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineOutput:
    """A finished generation."""

    request_id: str
    tokens: list[int]
    """Sampled ids, those of the stop string or end-of-sequence token included."""
    logprobs: list[float]
    """log p of each sampled token in the distribution that it was sampled from, nats; greedy: at temperature 1."""
    text: str
    """The tokens' text, cut right after the stop string."""
    finish_reason: str
    """stop (a stop string or the end of sequence) | length."""
    stop_string: str | None
    """The stop string that ended it."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache."""


@dataclass(frozen=True, kw_only=True)
class ScoreOutput:
    """A finished scoring of an answer."""

    request_id: str
    answer_logprobs: list[float]
    """log p of each answer token given all before it, nats."""
    num_prompt_tokens: int
    """Prefix and answer together."""
    num_cached_tokens: int
