"""Play held-out questions and judge the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from a2tgpo.lifecycle.stop_request import StopRequest
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.engine_group import ALONE, EngineGroup
from a2tgpo.reward.outcome import judged_text, score_response
from a2tgpo.rollout.group_rollout import Finished, GroupRollout, RolloutInterruptedError
from a2tgpo.trajectory import Prompt

_SQUARE = "square of "
"""Prefix of a metric that sums a score's squares."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to one question."""

    question_id: str
    question: str
    golds: tuple[str, ...]
    hops: int
    sample_index: int
    answer: str | None
    """Content of the box; None if there is none."""
    exact_match: float
    """Whether or not the format is right."""
    f1: float
    format_ok: bool
    tool_calls: int
    stop_reason: str

    @property
    def exact_match_gated(self) -> float:
        """Exact match, but 0 if the format is wrong."""
        return self.exact_match if self.format_ok else 0.0

    @property
    def f1_gated(self) -> float:
        return self.f1 if self.format_ok else 0.0


def evaluate(
    rollout: GroupRollout,
    prompts: Sequence[Prompt],
    engine_group: EngineGroup = ALONE,
    *,
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """Answer every question once, greedily; every rank of the world must call this with its engine's share.

    Args:
        prompts: this engine's share of the questions; may be empty.
        stop: reports a requested stop, which interrupts the evaluation; None: never.

    Returns:
        Metrics over all questions, equal on all ranks: em (of any format), em_format_gated, f1, the standard
        errors of these three as standard_error_em and so on, format_ok_rate, tool_calls, num_questions, and em by
        hops as em_1_hops and so on.

    Raises:
        StopAgreed: on all ranks, if interrupted.
    """
    answers: dict[str, Answer] = {}
    is_interrupted = False
    try:
        for answer in answer_questions(rollout, prompts, should_stop=stop.should_stop if stop else None):
            answers[answer.question_id] = answer
    except RolloutInterruptedError:
        is_interrupted = True
    if stop is not None:
        stop.agree(is_interrupted)
    sums = MetricSums()
    sums.add("num_questions", 0, 0)
    for prompt in (
        prompts if engine_group.is_leader else ()
    ):  # in one order, since sums of floats depend on it
        _add(sums, answers[prompt.id])
    return _with_standard_errors(sums.reduce(dist.group.WORLD))


def answer_questions(
    rollout: GroupRollout,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 0,
    seed: int = 0,
    skip: Container[tuple[int, int]] = (),
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Answer]:
    """Play these questions on this rank's engine; all ranks of the engine must iterate alike.

    Args:
        num_samples: answers drawn per question at `rollout.temperature`; 0: one greedy answer.
        seed: of the draws.
        skip: (index of the prompt, sample) of answers that exist already.
        should_stop: as in `GroupRollout.finished`, whose errors are raised here, too.

    Yields:
        Each answer as it is given.
    """
    playing = rollout.play(
        prompts,
        seed=seed,
        version=0,
        greedy=num_samples == 0,
        group_size=max(1, num_samples),
        score_gain=False,
        skip=skip,
    )
    for done in rollout.finished(playing, should_stop=should_stop):
        yield _judge(done, tools=rollout.tool_names, opening_tags=rollout.opening_tags)


def _judge(done: Finished, *, tools: tuple[str, ...], opening_tags: str) -> Answer:
    prompt, trajectory = done.prompt, done.trajectory
    answered = [turn.query is not None for turn in trajectory.turns]
    response = judged_text(list(zip(done.turn_texts, answered, strict=True)), opening_tags=opening_tags)
    outcome = score_response(response, prompt.answers, tools=tools)
    return Answer(
        question_id=prompt.id,
        question=prompt.question,
        golds=prompt.answers,
        hops=prompt.hops,
        sample_index=trajectory.sample_index,
        answer=outcome.answer,
        exact_match=outcome.exact_match,
        f1=outcome.f1,
        format_ok=outcome.format_ok,
        tool_calls=trajectory.num_process_turns,
        stop_reason=trajectory.stop_reason,
    )


def _with_standard_errors(metrics: dict[str, float]) -> dict[str, float]:
    """Return `metrics` with each score's mean square replaced by its standard error.

    sqrt((mean of squares - square of mean) / n); for em, which is 0 or 1, that is sqrt(em (1 - em) / n).
    """
    found = {name: value for name, value in metrics.items() if not name.startswith(_SQUARE)}
    for name in (name.removeprefix(_SQUARE) for name in metrics if name.startswith(_SQUARE)):
        variance = max(0.0, metrics[f"{_SQUARE}{name}"] - metrics[name] ** 2)  # rounding may make it negative
        found[f"standard_error_{name}"] = math.sqrt(variance / metrics["num_questions"])
    return found


def _add(sums: MetricSums, answer: Answer) -> None:
    sums.add("num_questions", 1, 0)
    scores = {"em": answer.exact_match, "em_format_gated": answer.exact_match_gated, "f1": answer.f1}
    for name, score in scores.items():
        sums.add(name, score, 1)
        sums.add(f"{_SQUARE}{name}", score**2, 1)
    sums.add("format_ok_rate", answer.format_ok, 1)
    sums.add("tool_calls", answer.tool_calls, 1)
    if answer.hops:
        sums.add(f"em_{answer.hops}_hops", answer.exact_match, 1)
