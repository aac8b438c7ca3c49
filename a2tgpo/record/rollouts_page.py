"""Write a self-contained page with a run's rollouts: groups, turns, gains, and tokens coloured by log-prob.

The page contains the records as gzip in base64. Its template rollouts_page.html never renders text as HTML.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from a2tgpo.io.atomic_file import write_text

MAX_TRAJECTORIES = 4096
"""Largest number of trajectories on one page. If there are more, the page shows only evenly spaced steps."""
TEMPLATE = Path(__file__).with_name("rollouts_page.html")
PLACE = "@DATA@"
MAX_BYTES = 4
"""Largest number of bytes of a character in UTF-8. A character has at most as many tokens as bytes."""

_SPECIAL = re.compile(r"<[|｜][^|｜>]{1,40}[|｜]>")
_ROLE = re.compile(r"^(?:system|user|assistant)(?=\s|$)")

Decode = Callable[[Sequence[int]], str]


def chosen_steps(sizes: Mapping[int, int]) -> list[int]:
    """Return the steps to show, including the first and the last.

    Args:
        sizes: the number of trajectories of each step, including inner branches.
    """
    steps = sorted(sizes)
    room = max(2, MAX_TRAJECTORIES // max(1, max(sizes.values())))
    if len(steps) <= room:
        return steps
    return sorted({steps[round(i * (len(steps) - 1) / (room - 1))] for i in range(room)})


def with_branches(records: Sequence[dict]) -> list[dict]:
    """Return the recorded rollouts, each followed by its inner branches."""
    return [one for record in records for one in (record, *record.get("inner_branches", ()))]


def write_page(out: Path, name: str, steps: Mapping[int, Sequence[dict]], decode: Decode | None) -> None:
    """Write the page with the rollouts of a run to the file `out` atomically.

    Args:
        name: the name of the run.
        steps: the recorded rollouts of each step.
        decode: converts token ids to text. The page then shows each token in a colour that depends on the token's
            log-prob. None: tokens have no colours.
    """
    content = {
        "name": name,
        "steps": [
            {"step": step, "records": [_slim(one, decode) for one in with_branches(records)]}
            for step, records in steps.items()
        ],
    }
    packed = base64.b64encode(gzip.compress(json.dumps(content, ensure_ascii=False).encode(), mtime=0))
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    write_text(out, before + packed.decode("ascii") + after)


def _slim(record: dict, decode: Decode | None) -> dict:
    """Return only those parts of a record that the page shows."""
    kept = (
        "prompt_index prompt_id sample_index hops outcome_reward exact_match format_ok stop_reason "
        "baseline_prob prompt_text"
    )
    return {
        **{name: record[name] for name in kept.split()},
        "rewards": record.get("rewards") or {},
        "reward_error": record.get("reward_error"),
        "branch": record.get("branch"),
        "question": _question(record["prompt_text"]),
        "turns": [_slim_turn(turn, decode) for turn in record["turns"]],
    }


def _slim_turn(turn: dict, decode: Decode | None) -> dict:
    kept = (
        "query tool tool_failed info_gain score answer_prob advantage clip_scale ratio text observation_text"
    )
    slim = {name: turn.get(name) for name in kept.split()} | {"num_tokens": len(turn["tokens"])}
    if len(calls := turn.get("calls") or []) > 1:
        slim["query"] = "; ".join(call["arguments"] for call in calls)
        slim["tool"] = ", ".join(call["tool"] for call in calls)
    if decode is not None:
        slim["pieces"] = pieces(turn["tokens"], turn["rollout_logprobs"], decode)
        del slim["text"]
    return slim


def pieces(tokens: Sequence[int], logprobs: Sequence[float], decode: Decode) -> list[tuple[str, float]]:
    """Return (text, log-prob) for each token. Tokens that form one character together are one piece.

    The log-prob of such a piece is the sum over its tokens.
    """
    found: list[tuple[str, float]] = []
    pending: list[int] = []
    logprob = 0.0
    for token, value in zip(tokens, logprobs, strict=True):
        pending.append(token)
        logprob += value
        text = decode(pending)
        if "\ufffd" not in text or len(pending) >= MAX_BYTES:
            found.append((text, round(logprob, 4)))
            pending, logprob = [], 0.0
    if pending:
        found.append((decode(pending), round(logprob, 4)))
    return found


def _question(prompt_text: str) -> str:
    """Return the question: the last text of a rendered prompt, apart from special tokens and names of roles."""
    parts = [part.strip() for part in _SPECIAL.split(prompt_text)]
    worded = [_ROLE.sub("", part).strip() for part in parts]
    return next((part for part in reversed(worded) if part), "")[-300:]
