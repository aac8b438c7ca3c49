"""The questions of several sets, answered by all engine replicas; every answer is kept as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist

from a2tgpo.data.template import PromptSet
from a2tgpo.evaluate.answer_log import GREEDY, SAMPLE, AnswerLog, Key
from a2tgpo.evaluate.evaluate import Answer, answer_questions
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.stop_request import StopRequest
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.rollout.multi_turn import RolloutCutError


def answer_sets(
    rollout: GroupRollout,
    sets: Mapping[str, PromptSet],
    *,
    num_samples: int,
    seed: int,
    replica: int,
    num_replicas: int,
    known: Mapping[Key, Answer],
    log: AnswerLog | None,
    stop: StopRequest,
    on_answer: Callable[[], None],
) -> dict[str, list[Answer]]:
    """Answers to all questions, by set and in its order; every rank of the world calls this.

    Args:
        num_samples: answers drawn per question; 0: one, greedily.
        seed: of the draws.
        replica: number of this rank's replica, of `num_replicas`.
        known: answers that are not asked for again, equal on all ranks.
        log: of this replica; None on its ranks but the first.
        stop: ends the evaluation early when the run is to stop.
        on_answer: called when this replica has answered once more.

    Raises:
        StopAgreed: on all ranks, if it was broken off; `log` holds what was answered.
    """
    world = dist.group.WORLD
    assert world is not None, "the processes are joined"
    kind = SAMPLE if num_samples else GREEDY
    answers: dict[str, list[Answer]] = {}
    for name, prompt_set in sets.items():
        there = _there(known, name, kind, prompt_set, max(1, num_samples))
        missing = [
            position
            for position in range(len(prompt_set))
            if any((position, sample) not in there for sample in range(max(1, num_samples)))
        ]

        def keep(answer: Answer, name: str = name) -> None:
            if log is not None:
                log.append(name, kind, answer)
            on_answer()

        mine: list[Answer] = []
        is_cut = False
        try:
            mine, _ = answer_questions(
                rollout,
                prompt_set.prompts(range(len(prompt_set)), missing[replica::num_replicas]),
                num_samples=num_samples,
                seed=seed,
                skip=there.keys(),
                on_answer=keep,
                is_cut=stop.is_asked,
            )
        except RolloutCutError:
            is_cut = True
        stop.agree(is_cut)
        parts = all_gather_object(mine if log is not None else [], world)
        answers[name] = _in_order(
            [*there.values(), *(answer for part in parts for answer in part)], prompt_set
        )
    return answers


def _in_order(answers: Sequence[Answer], prompt_set: PromptSet) -> list[Answer]:
    """By question as the set has them, and by sample within."""
    places = {question.id: place for place, question in enumerate(prompt_set.questions)}
    return sorted(answers, key=lambda answer: (places[answer.question_id], answer.sample_index))


def _there(
    known: Mapping[Key, Answer], name: str, kind: str, prompt_set: PromptSet, num_samples: int
) -> dict[tuple[int, int], Answer]:
    """The known answers to this set's questions by (position, sample)."""
    return {
        (position, sample): known[key]
        for position, question in enumerate(prompt_set.questions)
        for sample in range(num_samples)
        if (key := (name, kind, question.id, sample)) in known
    }
