"""Play held-out questions, and score the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from a2tgpo.lifecycle.stop_request import StopRequest
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.engine_group import ALONE, EngineGroup
from a2tgpo.protocol.protocol import ResponseFormat
from a2tgpo.reward.outcome import score_answer
from a2tgpo.rollout.group_rollout import Finished, GroupRollout, RolloutInterruptedError
from a2tgpo.trajectory import Prompt

_SQUARE = "square of "
"""Prefix of the names of metrics that sum the squares of a score."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    question_id: str
    question: str
    golds: tuple[str, ...]
    hops: int
    sample_index: int
    answer: str | None
    """The content of the answer's box, or None if the response has no box."""
    exact_match: float
    """1 if the answer matches a gold answer, else 0. The format has no effect on this score."""
    f1: float
    format_ok: bool
    tool_calls: int
    stop_reason: str

    @property
    def exact_match_gated(self) -> float:
        """The exact match, or 0 if the format of the response is wrong."""
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
    """Answer every question once, greedily, and return metrics over all questions.

    Every rank of the world must call this.

    Args:
        prompts: the questions that this rank's engine answers, possibly none.
        stop: reports a requested stop, which interrupts the evaluation. If None, nothing interrupts the evaluation.

    Returns:
        A map from each metric's name to its value, equal on all ranks. The scores are em (a wrong format does not
        change it), em_format_gated and f1. standard_error_SCORE is the standard error of SCORE. Other metrics are
        format_ok_rate, tool_calls, num_questions, and em_N_hops, the em over the questions with N hops.

    Raises:
        StopAgreed: on all ranks, if the evaluation was interrupted.
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
    ):  # always in the order of the prompts, because a sum of floats depends on its order
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
    """Play the questions of `prompts` on this rank's engine, and yield each answer as soon as it is complete.

    All ranks of the engine must iterate in the same way. The iteration raises the errors of `GroupRollout.finished`.

    Args:
        num_samples: the number of answers to draw per question at `rollout.temperature`. 0 means one greedy answer.
        skip: pairs (index of the prompt, sample index) of answers that exist already.
        should_stop: returns whether to interrupt the rollout (see `GroupRollout.finished`).
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
        yield _judge(done, rollout.protocol.format)


def _judge(done: Finished, response: ResponseFormat) -> Answer:
    prompt, trajectory = done.prompt, done.trajectory
    answer = response.answer_of(trajectory, done.turn_texts)
    format_ok = answer is not None and response.is_well_formed(trajectory, done.turn_texts)
    outcome = score_answer(answer, prompt.answers, format_ok=format_ok)
    return Answer(
        question_id=prompt.id,
        question=prompt.question,
        golds=prompt.answers,
        hops=prompt.hops,
        sample_index=trajectory.sample_index,
        answer=answer,
        exact_match=outcome.exact_match,
        f1=outcome.f1,
        format_ok=format_ok,
        tool_calls=trajectory.num_process_turns,
        stop_reason=trajectory.stop_reason,
    )


def _with_standard_errors(metrics: dict[str, float]) -> dict[str, float]:
    """Return `metrics`, in which standard errors of scores replace the means of squares.

    The standard error is sqrt((mean of squares - square of mean) / n).
    """
    found = {name: value for name, value in metrics.items() if not name.startswith(_SQUARE)}
    for name in (name.removeprefix(_SQUARE) for name in metrics if name.startswith(_SQUARE)):
        variance = max(0.0, metrics[f"{_SQUARE}{name}"] - metrics[name] ** 2)  # rounding may give less than 0
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
