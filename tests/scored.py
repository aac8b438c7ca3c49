"""Score a response as a training step does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from a2tgpo.protocol.tag_format import TagFormat
from a2tgpo.reward.episode import EpisodeReader
from a2tgpo.reward.load import NamedReward
from a2tgpo.reward.methods.em import ExactMatch
from a2tgpo.reward.methods.f1 import TokenF1
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.reward.total import judge
from a2tgpo.trajectory import Prompt, Trajectory, Turn

EM = (NamedReward(label="em", weight=1.0, reward=ExactMatch(), path=Path("em.py")),)
"""The default rewards."""
_EM_AND_F1 = (*EM, NamedReward(label="f1", weight=0.0, reward=TokenF1(), path=Path("f1.py")))


def tag_reader(**settings: Any) -> EpisodeReader:
    """Return a reader of episodes in tags, whose tokens are not decoded. `settings` are those of `TagFormat`."""
    return EpisodeReader(format=TagFormat(**settings), decode=str)


def prompt_of(answers: Sequence[str], **fields: Any) -> Prompt:
    return Prompt(
        **{"index": 0, "id": "0", "question": "q", "answers": tuple(answers), "tokens": (1,)} | fields
    )


def score(
    reward: TrajectoryReward,
    trajectory: Trajectory,
    texts: Sequence[str],
    answers: Sequence[str],
    logprobs: Sequence[list[list[float]] | None] = (),
    *,
    rewards: Sequence[NamedReward] = EM,
) -> None:
    """Set all fields of `trajectory`."""
    episode = reward.begin(trajectory, prompt_of(answers), texts, logprobs)
    reward.finish(trajectory, judge(rewards, episode, format_gate=reward.config.format_gate))


def score_response(
    response: str, golds: Sequence[str], *, tools: tuple[str, ...] = ("search",)
) -> SimpleNamespace:
    """Return reward, EM, F1, answer and format of a whole response with its `<result>` blocks."""
    trajectory = Trajectory(
        prompt_index=0,
        prompt_id="0",
        sample_index=0,
        prompt_tokens=[1],
        turns=[Turn(tokens=[1], rollout_logprobs=[0.0])],
        stop_reason="answer",
    )
    reader = tag_reader(tools=tools, opening_tags="")
    episode = reader.read(trajectory, prompt_of(golds), [response])
    verdict = judge(_EM_AND_F1, episode, format_gate=True)
    return SimpleNamespace(
        reward=verdict.total,
        exact_match=verdict.rewards["em"],
        f1=verdict.rewards["f1"],
        format_ok=episode.format_ok,
        answer=episode.answer,
    )
