"""The format of a response in the chat protocol, and the answer in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from a2tgpo.data.thought import THINK_CLOSE, THINK_OPEN, THINK_TAG, after_thought, thought_is_open
from a2tgpo.protocol.answer_box import last_box
from a2tgpo.protocol.call_format import CallFormat
from a2tgpo.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    r"""Finds the answer in the last turn's `\boxed{...}`, and judges the format (see `ResponseFormat`)."""

    calls: CallFormat
    thinks: bool
    """Whether the model's turns contain thoughts."""
    opening_tags: str = ""
    """The think tags at the end of the prompt (`PromptTemplate.opening_tags`). They precede every turn."""
    is_strict: bool = True
    """Whether the format of all turns is checked, and not only the format of the last turn."""

    @property
    def starts_in_thought(self) -> bool:
        return thought_is_open(self.opening_tags)

    def visible(self, text: str) -> str:
        """Return the part of a turn's text after its thought."""
        return after_thought(text, before=self.starts_in_thought)

    def answer_of(self, trajectory: Trajectory, texts: Sequence[str]) -> str | None:
        if not trajectory.turns or trajectory.turns[-1].is_process:
            return None
        return last_box(self.visible(texts[-1]))

    def is_well_formed(self, trajectory: Trajectory, texts: Sequence[str]) -> bool:
        """Return whether the last turn has an answer and no call.

        If `is_strict`, also require that no limit ended the trajectory, that no call has a problem and, if the model
        thinks, that each turn has exactly one thought.
        """
        if self.answer_of(trajectory, texts) is None or self.calls.find_calls(self.visible(texts[-1])):
            return False
        if not self.is_strict:
            return True
        return (
            trajectory.stop_reason == "answer"
            and all(call.problem is None for turn in trajectory.turns for call in turn.calls)
            and all(map(self._has_right_thoughts, texts))
        )

    def _has_right_thoughts(self, text: str) -> bool:
        if not self.thinks:
            return True
        expected = [THINK_OPEN, THINK_CLOSE]
        return THINK_TAG.findall(self.opening_tags + text) == expected
