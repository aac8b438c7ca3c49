"""Play held-out questions and judge the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from a2tgpo.lifecycle.stop_request import StopRequest
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.reward.outcome import judged_text, score_response
from a2tgpo.rollout.group_rollout import GroupRollout, Progress
from a2tgpo.rollout.multi_turn import RolloutCutError
from a2tgpo.trajectory import Prompt, Trajectory

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
    *,
    is_replica_first: bool = True,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> tuple[dict[str, float], list[Trajectory]]:
    """Answer every question once, greedily; every rank of `group` must call this with its share.

    Args:
        rollout: this rank's.
        prompts: this replica's share of the questions; may be empty.
        is_replica_first: this rank counts its replica's answers; its other ranks count none.
        group: the ranks of all replicas; None: the world.
        progress: as in `GroupRollout.run`.
        stop: reports a requested stop, which interrupts the evaluation; `group` must then be the world. None: never.

    Returns:
        Metrics over all questions, equal on all ranks: em (of any format), em_format_gated, f1, the standard
        errors of these three as standard_error_em and so on, format_ok_rate, tool_calls, num_questions, and em by
        hops as em_1_hops and so on; and the trajectories that this replica played.

    Raises:
        StopAgreed: on all ranks, if interrupted.
    """
    is_cut = False
    try:
        answers, trajectories = answer_questions(
            rollout,
            prompts,
            progress=progress,
            is_cut=stop.is_requested if stop else None,
        )
    except RolloutCutError:
        is_cut = True
    if stop is not None:
        stop.agree(is_cut)
    sums = MetricSums()
    sums.add("num_questions", 0, 0)
    for answer in answers if is_replica_first else ():
        _add(sums, answer)
    return _with_standard_errors(sums.reduce(group)), trajectories


def answer_questions(
    rollout: GroupRollout,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 0,
    seed: int = 0,
    skip: Container[tuple[int, int]] = (),
    progress: Progress | None = None,
    on_answer: Callable[[Answer], None] | None = None,
    is_cut: Callable[[], bool] | None = None,
) -> tuple[list[Answer], list[Trajectory]]:
    """Play these questions on this rank's engine; all ranks of its replica must make the same call.

    Args:
        num_samples: answers drawn per question at `rollout.temperature`; 0: one greedy answer.
        seed: of the draws.
        skip: (index of the prompt, sample) of answers that exist already.
        progress: as in `GroupRollout.run`.
        on_answer: called with each answer as it comes.
        is_cut: as in `GroupRollout.run`, whose errors are passed on.

    Returns:
        Answers and their trajectories, sorted by question, then by sample.
    """
    by_index = {prompt.index: prompt for prompt in prompts}

    def judge(trajectory: Trajectory) -> Answer:
        return _judge(
            by_index[trajectory.prompt_index],
            trajectory,
            rollout.turn_texts(trajectory),
            tools=rollout.tool_names,
            opening_tags=rollout.opening_tags,
        )

    def tell(trajectory: Trajectory) -> None:
        if on_answer is not None:
            on_answer(judge(trajectory))

    trajectories, _ = rollout.run(
        prompts,
        seed=seed,
        step=0,
        greedy=num_samples == 0,
        group_size=max(1, num_samples),
        score_gain=False,
        skip=skip,
        progress=progress,
        finished=tell,
        is_cut=is_cut,
    )
    return [judge(trajectory) for trajectory in trajectories], trajectories


def _judge(
    prompt: Prompt,
    trajectory: Trajectory,
    texts: Sequence[str],
    *,
    tools: tuple[str, ...],
    opening_tags: str,
) -> Answer:
    answered = [turn.query is not None for turn in trajectory.turns]
    response = judged_text(list(zip(texts, answered, strict=True)), opening_tags=opening_tags)
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
