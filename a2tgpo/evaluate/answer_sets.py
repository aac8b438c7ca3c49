"""Answer the questions of several sets on all engines, and store each answer as soon as an engine gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from a2tgpo.data.template import PromptSet
from a2tgpo.evaluate.answer_log import GREEDY, SAMPLE, AnswerLog, Key
from a2tgpo.evaluate.evaluate import Answer, answer_questions
from a2tgpo.lifecycle.stop_request import StopRequest
from a2tgpo.parallel.collectives import all_gather_object, world_group
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.reward.pool import RewardPool
from a2tgpo.rollout.group_rollout import GroupRollout, RolloutInterruptedError


def answer_sets(
    rollout: GroupRollout,
    sets: Mapping[str, PromptSet],
    *,
    num_samples: int,
    seed: int,
    engine_group: EngineGroup,
    known: Mapping[Key, Answer],
    log: AnswerLog | None,
    rewards: RewardPool,
    stop: StopRequest,
    bar: tqdm,
) -> dict[str, list[Answer]]:
    """Return the answers to the questions of each set, in the order of the set.

    Every rank of the world must call this.

    Args:
        num_samples: the number of answers to draw per question. 0 means one greedy answer.
        engine_group: the ranks that share this rank's engine.
        known: answers of an earlier start, equal on all ranks. Their questions are not played again.
        log: the answer log of this engine. It is None unless this rank is the leader of its engine.
        rewards: computes the scores of the answers, on the leader of each engine.
        stop: reports a requested stop, which interrupts the evaluation.
        bar: shows the progress of this engine. All engines progress at about the same rate.

    Raises:
        StopAgreed: on all ranks, if the evaluation was interrupted. `log` then contains the answers so far.
    """
    world = world_group()
    kind = SAMPLE if num_samples else GREEDY
    answers: dict[str, list[Answer]] = {}
    for name, prompt_set in sets.items():
        found = _known_answers(known, name, kind, prompt_set, max(1, num_samples))
        missing = [
            position
            for position in range(len(prompt_set))
            if any((position, sample) not in found for sample in range(max(1, num_samples)))
        ]
        mine: list[Answer] = []
        is_interrupted = False
        try:
            for answer in answer_questions(
                rollout,
                prompt_set.prompts(range(len(prompt_set)), engine_group.share(missing)),
                num_samples=num_samples,
                seed=seed,
                skip=found.keys(),
                rewards=rewards,
                engine_group=engine_group,
                should_stop=stop.should_stop,
            ):
                mine.append(answer)
                if log is not None:
                    log.append(name, kind, answer)
                bar.update(min(engine_group.count, bar.total - bar.n))
        except RolloutInterruptedError:
            is_interrupted = True
        stop.agree(is_interrupted)
        parts = all_gather_object(mine if log is not None else [], world)
        answers[name] = _in_order(
            [*found.values(), *(answer for part in parts for answer in part)], prompt_set
        )
    return answers


def _in_order(answers: Sequence[Answer], prompt_set: PromptSet) -> list[Answer]:
    """Return `answers`, sorted by the position of the question in the set and then by sample index."""
    places = {question.id: place for place, question in enumerate(prompt_set.questions)}
    return sorted(answers, key=lambda answer: (places[answer.question_id], answer.sample_index))


def _known_answers(
    known: Mapping[Key, Answer], name: str, kind: str, prompt_set: PromptSet, num_samples: int
) -> dict[tuple[int, int], Answer]:
    """Return the known answers to the questions of data set `name`, keyed by (question's position, sample index)."""
    return {
        (position, sample): known[key]
        for position, question in enumerate(prompt_set.questions)
        for sample in range(num_samples)
        if (key := (name, kind, question.id, sample)) in known
    }
