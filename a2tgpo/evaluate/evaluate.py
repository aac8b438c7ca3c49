"""Play held-out questions, and score the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from a2tgpo.config.evaluation import powers_of_two, sampled_scores
from a2tgpo.evaluate.sets import EvaluationSets
from a2tgpo.lifecycle.stop_request import Stop
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.engine_group import ALONE, EngineGroup
from a2tgpo.reward.answer_match import exact_match, f1_score
from a2tgpo.reward.episode import Episode, reader_of
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.total import Verdict
from a2tgpo.rollout.group_rollout import Finished, GroupRollout, RolloutInterruptedError
from a2tgpo.rollout.judging import Judging
from a2tgpo.trajectory import Prompt

_SQUARE, _NUMBER = "square of ", "number of "
"""Prefixes of a score's name for two more metrics: the mean of the score's squares, and the number of its values."""


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
    scores: dict[str, float] = field(default_factory=dict)
    """The values of the run's rewards and of their parts, by name. The entry `reward` is the weighted sum of the
    rewards. Empty if no rewards were computed, or if a reward could not judge the answer."""
    reward_error: str | None = None
    """Why a reward could not judge the answer, in one line. None if all rewards judged the answer, or if no rewards
    were computed."""

    @property
    def exact_match_gated(self) -> float:
        """The exact match, or 0 if the format of the response is wrong."""
        return self.exact_match if self.format_ok else 0.0

    @property
    def f1_gated(self) -> float:
        return self.f1 if self.format_ok else 0.0


def evaluate(
    rollout: GroupRollout,
    sets: EvaluationSets,
    engine_group: EngineGroup = ALONE,
    *,
    num_samples: int = 0,
    seed: int = 0,
    rewards: RewardPool | None = None,
    stop: Stop | None = None,
) -> dict[str, float]:
    """Answer every question once greedily and `num_samples` times by sampling, and return metrics.

    Every rank of the world must call this. Each engine answers its share of the questions.

    Args:
        num_samples: number of further answers to draw per question, at `rollout.temperature`.
        seed: seed of the draws.
        rewards: rewards to compute as additional scores of the answers. None: no additional scores.
        stop: reports a requested stop, which interrupts the evaluation. If None, nothing interrupts the evaluation.

    Returns:
        A map from each metric's name to its value over all questions, equal on all ranks. The scores are em,
        em_format_gated and f1, and with samples also the `sampled_scores`. A wrong format does not change em.
        standard_error_SCORE is the standard error of SCORE. Other metrics are format_ok_rate, tool_calls,
        num_questions, and em_N_hops, the em over the questions with N hops. If there are several sets, the map also
        has SET/METRIC for each set and metric. With `rewards`, the map also has the `Answer.scores` of the greedy
        answers, and num_unjudged if a reward could not judge some of these answers.

    Raises:
        StopAgreed: on all ranks, if the evaluation was interrupted.
    """
    prompts = sets.prompts(engine_group.share(range(len(sets))))
    greedy: dict[str, Answer] = {}
    samples: dict[str, list[Answer]] = {prompt.id: [] for prompt in prompts}
    should_stop = stop.should_stop if stop else None
    is_interrupted = False
    try:
        for answer in answer_questions(
            rollout,
            prompts,
            rewards=rewards,
            engine_group=engine_group,
            should_stop=should_stop,
        ):
            greedy[answer.question_id] = answer
        if num_samples:
            drawn = answer_questions(
                rollout, prompts, num_samples=num_samples, seed=seed, should_stop=should_stop
            )
            for answer in drawn:
                samples[answer.question_id].append(answer)
    except RolloutInterruptedError:
        is_interrupted = True
    if stop is not None:
        stop.agree(is_interrupted)
    sums = MetricSums()
    sums.add("num_questions", 0, 0)
    # Always sum in the order of the prompts, because a sum of floats depends on the order of its terms.
    for prompt in prompts if engine_group.is_leader else ():
        scores = _scores(greedy[prompt.id]) | _sampled_scores(samples[prompt.id])
        for prefix in ("", f"{sets.name_of(prompt.index)}/") if len(sets.sets) > 1 else ("",):
            _add(sums, prefix, greedy[prompt.id], scores)
    return _with_standard_errors(sums.reduce(dist.group.WORLD))


def answer_questions(
    rollout: GroupRollout,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 0,
    seed: int = 0,
    skip: Container[tuple[int, int]] = (),
    rewards: RewardPool | None = None,
    engine_group: EngineGroup = ALONE,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Answer]:
    """Play the questions of `prompts` on this rank's engine, and yield each answer as soon as it is complete.

    All ranks of the engine must call this and iterate over the result. The iteration raises the errors of
    `GroupRollout.finished`, and `RewardFaultError` if a reward has a fault.

    Args:
        num_samples: the number of answers to draw per question at `rollout.temperature`. 0 means one greedy answer.
        skip: pairs (index of the prompt, sample index) of answers that already exist.
        rewards: computes the scores of the answers, on the leader of the engine. None: the answers get no scores.
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
    reader = reader_of(rollout.protocol)
    judging = Judging[Answer](rewards, engine_group, should_stop=should_stop)
    with judging:
        for done in rollout.finished(playing, should_stop=judging.should_stop):
            episode = reader.read(done.trajectory, done.prompt, done.turn_texts, is_evaluation=True)
            yield from _scored(judging.judge(_answer(done, episode), episode))
        yield from _scored(judging.rest())


def _scored(judged: Iterable[tuple[Answer, Verdict | None]]) -> Iterator[Answer]:
    """Yield the answers with the scores of their verdicts. An answer without a verdict has no scores."""
    for answer, verdict in judged:
        if verdict is None:
            yield answer
        elif verdict.error is not None:
            yield replace(answer, reward_error=verdict.error)
        else:
            yield replace(answer, scores=verdict.rewards | {"reward": verdict.total})


def _answer(done: Finished, episode: Episode) -> Answer:
    return Answer(
        question_id=episode.question_id,
        question=episode.question,
        golds=episode.answers,
        hops=done.prompt.hops,
        sample_index=episode.sample_index,
        answer=episode.answer,
        exact_match=0.0 if episode.answer is None else exact_match(episode.answer, episode.answers),
        f1=0.0 if episode.answer is None else f1_score(episode.answer, episode.answers),
        format_ok=episode.format_ok,
        tool_calls=done.trajectory.num_process_turns,
        stop_reason=episode.stop_reason,
    )


def _with_standard_errors(metrics: dict[str, float]) -> dict[str, float]:
    """Return `metrics` with the standard error of each score instead of the mean of its squares.

    The standard error is sqrt((mean of squares - square of mean) / n).
    """
    found = {name: value for name, value in metrics.items() if _SQUARE not in name and _NUMBER not in name}
    for square in (name for name in metrics if _SQUARE in name):
        prefix, _, score = square.partition(_SQUARE)
        variance = max(0.0, metrics[square] - metrics[prefix + score] ** 2)  # rounding may give less than 0
        found[f"{prefix}standard_error_{score}"] = math.sqrt(variance / metrics[f"{prefix}{_NUMBER}{score}"])
    return found


def _scores(answer: Answer) -> dict[str, float]:
    own = {"em": answer.exact_match, "em_format_gated": answer.exact_match_gated, "f1": answer.f1}
    return answer.scores | own


def _sampled_scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the scores of the sampled answers to one question, named as in `sampled_scores`."""
    count, right = len(answers), sum(answer.exact_match == 1 for answer in answers)
    names = sampled_scores(count)
    ks = [1, *powers_of_two(count)] if count else []
    return {name: pass_at_k(count, right, k) for name, k in zip(names, ks, strict=True)}


def _add(sums: MetricSums, prefix: str, answer: Answer, scores: Mapping[str, float]) -> None:
    sums.add(f"{prefix}num_questions", 1, 0)
    for name, score in scores.items():
        sums.add(f"{prefix}{name}", score, 1)
        sums.add(f"{prefix}{_SQUARE}{name}", score**2, 1)
        sums.add(f"{prefix}{_NUMBER}{name}", 1, 0)
    if answer.reward_error is not None:
        sums.add(f"{prefix}num_unjudged", 1, 0)
    sums.add(f"{prefix}format_ok_rate", answer.format_ok, 1)
    sums.add(f"{prefix}tool_calls", answer.tool_calls, 1)
    if answer.hops:
        sums.add(f"{prefix}em_{answer.hops}_hops", answer.exact_match, 1)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that at least one of k answers is right (arXiv:2107.03374, Eq. 1).

    The k answers are drawn without replacement from `num_samples` answers, of which `num_right` are right. For k = 1,
    the probability is the share of right answers.
    """
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
