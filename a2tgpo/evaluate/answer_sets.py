"""Answer the questions of several sets on all engine replicas; every answer is stored as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist

from a2tgpo.data.template import PromptSet
from a2tgpo.evaluate.answer_log import GREEDY, SAMPLE, AnswerLog, Key
from a2tgpo.evaluate.evaluate import Answer, answer_questions
from a2tgpo.lifecycle.stop_request import StopRequest
from a2tgpo.parallel.collectives import all_gather_object
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
    """Answer all questions; return the answers by set, in its order. Every rank of the world must call this.

    Args:
        num_samples: answers drawn per question; 0: one greedy answer.
        seed: of the draws.
        replica: index of this rank's engine replica, of `num_replicas`.
        known: answers that exist already, equal on all ranks.
        log: of this replica; None except on its first rank.
        stop: reports a requested stop, which interrupts the evaluation.
        on_answer: called for each new answer of this replica.

    Raises:
        StopAgreed: on all ranks, if interrupted; `log` holds the answers so far.
    """
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
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
                is_cut=stop.is_requested,
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
    """Sort by the set's order of questions, then by sample."""
    places = {question.id: place for place, question in enumerate(prompt_set.questions)}
    return sorted(answers, key=lambda answer: (places[answer.question_id], answer.sample_index))


def _there(
    known: Mapping[Key, Answer], name: str, kind: str, prompt_set: PromptSet, num_samples: int
) -> dict[tuple[int, int], Answer]:
    """Return the known answers to this set's questions by (position, sample)."""
    return {
        (position, sample): known[key]
        for position, question in enumerate(prompt_set.questions)
        for sample in range(num_samples)
        if (key := (name, kind, question.id, sample)) in known
    }
