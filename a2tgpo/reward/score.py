"""Score a played trajectory: the outcome reward, and the information gain of every process turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from a2tgpo.reward.info_gain import answer_logprob, answer_probability, info_gains
from a2tgpo.reward.outcome import SEARCH_ONLY, judged_text, score_response
from a2tgpo.trajectory import Trajectory


def score_trajectory(
    trajectory: Trajectory,
    turn_texts: Sequence[str],
    answers: Sequence[str],
    context_logprobs: Sequence[list[list[float]] | None],
    *,
    measure: str,
    tools: tuple[str, ...] = SEARCH_ONLY,
    length_penalty: Callable[[int], float] | None = None,
    opening_tags: str | None = None,
) -> None:
    """Set reward, exact match, format, answer probabilities and gains.

    Args:
        trajectory: changed in place.
        turn_texts: the policy's text of each turn.
        answers: the gold answer and its aliases.
        context_logprobs: for the prompt and after each process turn, log-probs per alias and token; None where they
            could not be computed; empty if nothing was scored.
        measure: `rollout.gain.measure`.
        tools: names of the tools that the policy may call.
        length_penalty: returns the penalty for a response of so many tokens, observations included, which is added to
            the outcome reward; exact match and format are unaffected. None: no penalty.
        opening_tags: those at the end of the prompt (`PromptTemplate.opening_tags`); None: unknown, so a response
            that first closes a thought is assumed to have it opened by the prompt.
    """
    answered = [turn.query is not None for turn in trajectory.turns]
    response = judged_text(list(zip(turn_texts, answered, strict=True)), opening_tags=opening_tags)
    outcome = score_response(response, answers, tools=tools)
    trajectory.outcome_reward = outcome.reward
    if length_penalty is not None:
        trajectory.outcome_reward += length_penalty(trajectory.num_tokens - len(trajectory.prompt_tokens))
    trajectory.exact_match = outcome.exact_match
    trajectory.format_ok = outcome.format_ok
    if not context_logprobs:
        return
    logprobs = [None if aliases is None else answer_logprob(aliases) for aliases in context_logprobs]
    trajectory.baseline_prob = answer_probability(logprobs[0])
    gains = info_gains(logprobs, measure=measure)
    for turn, logprob, gain in zip(trajectory.process_turns, logprobs[1:], gains, strict=True):
        turn.answer_prob = answer_probability(logprob)
        turn.info_gain = gain
