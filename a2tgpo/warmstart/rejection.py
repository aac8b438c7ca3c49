"""Make demonstrations from the good rollouts of a run (rejection sampling).

A rollout is accepted if it ended with an answer and passes every filter. The best few accepted rollouts of each
question become demonstrations. A rejected rollout is counted only under the first filter that rejects it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2tgpo.data.question_set import Question
from a2tgpo.io.errors import ConfigError
from a2tgpo.record.rollout_files import read_part, recorded_steps, step_ranges

CALL_CLOSE = "</tool_call>"
"""The tag that ends a call in the call format `hermes`."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The requirements for accepting a rollout."""

    min_reward: float | None = None
    """Smallest accepted outcome reward. None: any."""
    needs_exact_match: bool = True
    needs_format: bool = True
    max_failed_calls: int = 0
    """Largest accepted number of failed tool calls."""
    max_tokens: int = 0
    """Largest accepted number of sampled tokens; 0: no limit."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An accepted rollout."""

    step: int
    record: dict[str, Any]

    @property
    def order(self) -> tuple[float, int, int, int, int]:
        """The sort key, best first: higher reward, then fewer calls, fewer tokens, and a later step."""
        return (
            -self.record["outcome_reward"],
            _num_calls(self.record),
            _num_tokens(self.record),
            -self.step,
            self.record["sample_index"],
        )


def step_files(run: Path, *, first: int = 0, last: int | None = None) -> dict[int, list[Path]]:
    """Return the files of the rollouts of each recorded step of `run`.

    Args:
        first: the first step to return.
        last: the last step to return; None: the newest.

    Raises:
        ConfigError: with a one-line message, if no rollouts are recorded from step `first` to step `last`.
    """
    found = recorded_steps(run)
    chosen = {
        step: files for step, files in found.items() if first <= step and (last is None or step <= last)
    }
    if not chosen:
        recorded = f"steps {step_ranges(found)}" if found else "none"
        raise ConfigError(f"{run}/rollouts has no rollouts of the requested steps; it has {recorded}")
    return chosen


def read_rollouts(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield each trajectory in the `files` of a step. Only one file is in memory at a time.

    Raises:
        ConfigError: with a one-line message, if a file cannot be read or is damaged.
    """
    for path in files:
        try:
            yield from read_part(path)
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: the run has removed it in the meantime (run.keep_rollouts_gb); start again, or give "
                "later --steps"
            ) from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise ConfigError(f"{path} is damaged; leave its step out (--steps)") from None


def reject(record: Mapping[str, Any], filters: Filters) -> str:
    """Return in a few words why a rollout is rejected, or "" if it is accepted."""
    turns = record["turns"]
    if record["stop_reason"] != "answer" or not turns or turns[-1]["query"] is not None:
        return "without an answer"
    if record.get("reward_error"):
        return "without a reward"
    if filters.needs_format and not record["format_ok"]:
        return "broken format"
    if filters.needs_exact_match and record["exact_match"] != 1:
        return "wrong answer"
    if filters.min_reward is not None and record["outcome_reward"] < filters.min_reward:
        return "reward too low"
    if sum(_num_failed(turn) for turn in turns) > filters.max_failed_calls:
        return "failed calls"
    if filters.max_tokens and _num_tokens(record) > filters.max_tokens:
        return "too long"
    return ""


def choose(candidates: Iterable[Candidate], *, per_question: int, counts: Counter[str]) -> list[Candidate]:
    """Return the best `per_question` candidates of each question. Count the other candidates in `counts` by reason.

    The questions are in the order of `candidates`. Of candidates with the same text, only the best is chosen.
    """
    by_question: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_question.setdefault(candidate.record["prompt_id"], []).append(candidate)
    chosen = []
    for members in by_question.values():
        texts: set[str] = set()
        for candidate in sorted(members, key=lambda member: member.order):
            text = json.dumps([turn["text"] for turn in candidate.record["turns"]])
            if text in texts:
                counts["the same text as another"] += 1
            elif len(texts) == per_question:
                counts[f"more than {per_question} of a question"] += 1
            else:
                texts.add(text)
                chosen.append(candidate)
    return chosen


def to_demonstration(candidate: Candidate, question: Question) -> dict[str, Any]:
    """Return `candidate` as a record of a demonstration file (`data.demonstrations.load_demonstrations`)."""
    record = candidate.record
    turns = []
    for turn in record["turns"][:-1]:
        text = turn["text"]
        closing = next((tag for tag in (f"</{turn['tool']}>", CALL_CLOSE) if tag in text), None)
        if closing is None:
            raise ConfigError(
                f"question {question.id!r} has a rollout whose calls have no closing tag; only rollouts in tags and "
                "in the call format hermes can become demonstrations"
            )
        # Drop what follows the tag: the rest of the tag's last token and, in the chat protocol, the end of the turn.
        end = text.rfind(closing) + len(closing)
        turns.append({"text": text[:end], "observation": turn["observation_text"]})
    turns.append({"text": record["turns"][-1]["text"]})
    found: dict[str, Any] = {
        "id": question.id,
        "question": question.question,
        "answers": list(question.answers),
    }
    if question.hops:
        found["hops"] = question.hops
    return found | {"turns": turns, "quality": f"step {candidate.step}"}


def demonstrations_of(
    run: Path,
    questions: Sequence[Question],
    filters: Filters,
    *,
    per_question: int,
    first: int = 0,
    last: int | None = None,
) -> tuple[list[dict[str, Any]], Counter[str], int]:
    """Make demonstrations from the rollouts of a run.

    Args:
        questions: the training set of the run. The rollouts refer to its questions by id.
        per_question: largest number of demonstrations of a question.
        first: the first step to read.
        last: the last step to read; None: the newest.

    Returns:
        The records of the demonstrations, the number of rejected rollouts by reason, and the number of rollouts read.

    Raises:
        ConfigError: with a one-line message, if the run has no rollouts in these steps, if a file is damaged, or if
            the run had other questions.
    """
    by_id = {question.id: question for question in questions}
    counts: Counter[str] = Counter()
    candidates, num_read = [], 0
    for step, files in step_files(run, first=first, last=last).items():
        for record in read_rollouts(files):
            num_read += 1
            try:
                reason = reject(record, filters)
                is_known = record["prompt_id"] in by_id
            except (KeyError, TypeError):
                raise ConfigError(f"{files[0]} has no rollouts of this program") from None
            if not is_known:
                raise ConfigError(
                    f"{files[0]} has a rollout of question {record['prompt_id']!r:.60}, which is not among the "
                    "questions; give the run's own data.train (--questions)"
                )
            if reason:
                counts[reason] += 1
            else:
                candidates.append(Candidate(step=step, record=record))
    chosen = choose(candidates, per_question=per_question, counts=counts)
    return [to_demonstration(item, by_id[item.record["prompt_id"]]) for item in chosen], counts, num_read


def _num_calls(record: Mapping[str, Any]) -> int:
    return sum(turn["query"] is not None for turn in record["turns"])


def _num_failed(turn: Mapping[str, Any]) -> int:
    """Return the number of the turn's calls that failed. A turn that an earlier version recorded has at most one
    call."""
    return sum(call["failed"] for call in turn.get("calls") or [{"failed": turn["tool_failed"]}])


def _num_tokens(record: Mapping[str, Any]) -> int:
    return sum(len(turn["tokens"]) for turn in record["turns"])
