"""Engines that generate prescribed numbers of tokens, so that different agent loops do the same work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lengths import planned_turn

from a2tgpo.rollout.engine_output import EngineOutput, ScoreOutput
from a2tgpo.rollout.vllm_engine import VllmEngine


class EngineWithoutEnd(VllmEngine):
    """An engine that generates the requested number of tokens, even after an end-of-sequence token."""

    def _add(self, request_id: str, tokens: list[int], **params: Any) -> Any:
        return super()._add(request_id, tokens, ignore_eos=True, **params)

    def generate(self, request_id: str, tokens: Sequence[int], length: int, seed: int) -> None:
        """Submit a request that generates `length` tokens after `tokens`."""
        super().submit(request_id, tokens, max_tokens=length, seed=seed, temperature=1.0, top_p=1.0, stop=())

    def forget(self) -> None:
        """Drop the prefix cache, so that a variant cannot reuse the previous variant's entries."""
        assert self._engine.reset_prefix_cache()


class PlannedEngine(EngineWithoutEnd):
    """A simulated policy. A request's seed determines the turn's length and whether the turn ends with a search.

    Args:
        median, longest: median and largest number of tokens of a turn. The distribution is log-normal.
        call_share: share of the turns that end with a search. The other turns end with the answer.
        further: further arguments of `VllmEngine`.
    """

    def __init__(self, model_path: str, *, median: int, longest: int, call_share: float, **further: Any):
        super().__init__(model_path, **further)
        self._median, self._longest, self._call_share = median, longest, call_share
        self._calls: dict[str, bool] = {}

    def submit(self, request_id: str, tokens: Sequence[int], **options: Any) -> None:
        length, self._calls[request_id] = planned_turn(
            options["seed"], median=self._median, longest=self._longest, call_share=self._call_share
        )
        # After every token the engine looks for these strings, as it would for the real ones, but never finds them.
        options["stop"] = [f"{text} never" for text in options["stop"]]
        super().submit(request_id, tokens, **{**options, "max_tokens": length})

    def step(self) -> list[EngineOutput | ScoreOutput]:
        return [self._ended(output) for output in super().step()]

    def _ended(self, output: EngineOutput | ScoreOutput) -> EngineOutput | ScoreOutput:
        calls = self._calls.pop(output.request_id, None)
        if isinstance(output, ScoreOutput) or calls is None:  # the agent loop did not submit this request
            return output
        name = "search" if calls else "answer"
        return dataclasses.replace(
            output,
            text=f"<{name}> {output.request_id} </{name}>",
            stop_string=f"</{name}>",
            finish_reason="stop",
        )
