"""Compute an evaluation's scores by data set, number of tool calls and number of hops, and format them as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from a2tgpo.config.evaluation import powers_of_two
from a2tgpo.evaluate.evaluate import Answer, pass_at_k
from a2tgpo.io.tables import markdown_table

SCORES = ("em", "em_format_gated", "f1", "f1_format_gated", "format_ok_rate", "tool_calls")
AVERAGE = "average"
"""Name of the row with the means over all questions. Each question has the same weight, as in the paper's tables."""


def summarize(greedy: Mapping[str, Sequence[Answer]], sampled: Mapping[str, Sequence[Answer]]) -> dict:
    """Return the scores of an evaluation, as nested dicts of plain numbers.

    Args:
        greedy: one answer per question, for each data set. No set is empty.
        sampled: several answers per question, for each data set. The map may be empty.

    Returns:
        `sets`, which maps each data set to its entry, and `average`, the entry over all questions. Each entry has
        `num_questions` and the `SCORES`. The maps `by_tool_calls` and `by_hops` in an entry give these values for
        each number of tool calls or hops separately. If there are sampled answers, the entry has `pass_at`, which
        gives `exact_match` and `format_gated` for each k that is a power of two.
    """
    pooled = [answer for answers in greedy.values() for answer in answers]
    per_set = {
        name: _scores(answers) | _breakdowns(answers) | _pass_at(_by_question(sampled.get(name, ())))
        for name, answers in greedy.items()
    }
    groups = [group for answers in sampled.values() for group in _by_question(answers)]
    average = _scores(pooled) | _breakdowns(pooled) | _pass_at(groups)
    return {"sets": per_set, AVERAGE: average}


def to_scalars(summary: dict) -> dict[str, float]:
    """Return the numbers of the summary as scalars for TensorBoard, each with the name `SET/score`."""
    scalars: dict[str, float] = {}
    for name, scores in {**summary["sets"], AVERAGE: summary[AVERAGE]}.items():
        scalars |= {f"{name}/{reward}": value for reward, value in scores["rewards"].items()}
        scalars |= {f"{name}/{score}": scores[score] for score in SCORES}
        for kind in ("exact_match", "format_gated") if "pass_at" in scores else ():
            by_k = scores["pass_at"][kind]
            scalars |= {f"{name}/pass_at_{k}_{kind}": value for k, value in by_k.items()}
    return scalars


def to_markdown(summary: dict, *, title: str, notes: Sequence[str]) -> str:
    """Return the summary as a Markdown page of tables."""
    rows = {**summary["sets"], AVERAGE: summary[AVERAGE]}
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), "", "## Greedy", ""]
    lines.append(
        markdown_table(
            ["set", "questions", "EM", "EM, format gate", "F1", "F1, format gate", "format ok", "tool calls"],
            [
                [name, str(s["num_questions"]), *(f"{s[score]:.3f}" for score in SCORES)]
                for name, s in rows.items()
            ],
        )
    )
    rewards = list(dict.fromkeys(reward for s in rows.values() for reward in s["rewards"]))
    if rewards:
        body = [[name, *(_shown(s["rewards"].get(reward)) for reward in rewards)] for name, s in rows.items()]
        lines += ["", "## Rewards", "", markdown_table(["set", *rewards], body)]
    sampled = {name: s["pass_at"] for name, s in rows.items() if "pass_at" in s}
    if sampled:
        ks = list(next(iter(sampled.values()))["exact_match"])
        lines += ["", "## pass@k", ""]
        lines.append(
            markdown_table(
                ["set", *(f"pass@{k}" for k in ks), *(f"pass@{k}, format gate" for k in ks)],
                [
                    [
                        name,
                        *(f"{p['exact_match'][k]:.3f}" for k in ks),
                        *(f"{p['format_gated'][k]:.3f}" for k in ks),
                    ]
                    for name, p in sampled.items()
                ],
            )
        )
    for heading, key in (("tool calls", "by_tool_calls"), ("hops", "by_hops")):
        body = [
            [name, str(number), str(s["num_questions"]), *(f"{s[score]:.3f}" for score in SCORES[:4])]
            for name, scores in rows.items()
            for number, s in scores[key].items()
        ]
        if body:
            lines += ["", f"## By number of {heading}", ""]
            lines.append(
                markdown_table(
                    ["set", heading, "questions", "EM", "EM, format gate", "F1", "F1, format gate"], body
                )
            )
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _scores(answers: Sequence[Answer]) -> dict:
    count = len(answers)
    sums = {
        "em": sum(answer.exact_match for answer in answers),
        "em_format_gated": sum(answer.exact_match_gated for answer in answers),
        "f1": sum(answer.f1 for answer in answers),
        "f1_format_gated": sum(answer.f1_gated for answer in answers),
        "format_ok_rate": sum(answer.format_ok for answer in answers),
        "tool_calls": sum(answer.tool_calls for answer in answers),
    }
    means = {name: value / count for name, value in sums.items()}
    return {"num_questions": count, **means, "rewards": _rewards(answers)}


def _rewards(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the mean of each reward over the answers that the reward judged."""
    found: dict[str, list[float]] = {}
    for answer in answers:
        for name, score in answer.scores.items():
            found.setdefault(name, []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def _breakdowns(answers: Sequence[Answer]) -> dict:
    calls = sorted({answer.tool_calls for answer in answers})
    hops = sorted({answer.hops for answer in answers if answer.hops})
    return {
        "by_tool_calls": {n: _scores([a for a in answers if a.tool_calls == n]) for n in calls},
        "by_hops": {n: _scores([a for a in answers if a.hops == n]) for n in hops},
    }


def _by_question(answers: Sequence[Answer]) -> list[list[Answer]]:
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.question_id, []).append(answer)
    return list(groups.values())


def _pass_at(groups: Sequence[Sequence[Answer]]) -> dict:
    if not groups:
        return {}
    num_samples = len(groups[0])
    ks = [1, *powers_of_two(num_samples)]
    return {
        "pass_at": {
            "num_samples": num_samples,
            "exact_match": {k: _mean_pass(groups, k, gated=False) for k in ks},
            "format_gated": {k: _mean_pass(groups, k, gated=True) for k in ks},
        }
    }


def _mean_pass(groups: Sequence[Sequence[Answer]], k: int, *, gated: bool) -> float:
    right = [
        sum(answer.exact_match_gated if gated else answer.exact_match for answer in group) for group in groups
    ]
    total = sum(pass_at_k(len(group), int(n), k) for group, n in zip(groups, right, strict=True))
    return total / len(groups)
