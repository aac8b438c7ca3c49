"""The event loop of a rollout: all trajectories are in flight, each pauses only for its own tool call.

A trajectory ends with one of these stop reasons:
    answer       it wrote </answer>
    eos          it ended the sequence, or its turn as the chat template would, without an answer
    length       the turn's or the response's token budget is used up
    context      the engine's longest sequence is reached
    max_turns    it called a tool once more than allowed
    empty_query  it called a tool with an empty query
The turn in which that happens is the final one: it has neither query nor observation.

A trajectory with a budget may also pause. A paused trajectory has no stop reason and ends with an observation, from
which a later call continues the trajectory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from a2tgpo.rollout.answer_scorer import AnswerScore, AnswerScorer
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.engine_output import EngineOutput, ScoreOutput
from a2tgpo.rollout.observation import ObservationEncoder
from a2tgpo.rollout.tool_call import CallSyntax
from a2tgpo.rollout.tool_pool import ToolFaultError, ToolPool, ToolResult
from a2tgpo.trajectory import LogProbs, Prompt, TokenIds, Trajectory, Turn

if TYPE_CHECKING:
    from a2tgpo.rollout.vllm_engine import VllmEngine

HEARTBEAT_EVERY = 16
"""Passes of the loop between two heartbeats, while the engine has work."""
MIN_TURN_TOKENS = 32
"""Tokens that an observation leaves for the turn after it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Budgets of one trajectory."""

    max_turns: int
    max_turn_tokens: int
    max_response_tokens: int
    max_model_len: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are sampled; `seed` and `version` enter every request's seed."""

    temperature: float
    """0: greedy."""
    top_p: float
    seed: int
    version: int
    """Version of the weights, see `Turn.version`."""

    def turn_seed(self, group: PromptGroup, sample_index: int, turn_index: int) -> int | None:
        """Return the seed of one generation, which does not depend on the rank, the time or the other requests."""
        if self.temperature == 0:
            return None
        prompt = group.prompt
        name = f"{self.seed}|{self.version}|{prompt.index}|{prompt.id}|{sample_index}|{turn_index}"
        if group.begun not in (None, self.version):  # a new prompt may have the same index
            name += f"|{group.begun}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1  # vLLM takes a signed 64-bit number


@dataclass(kw_only=True)
class PromptGroup:
    """The data that the trajectories of one prompt share."""

    prompt: Prompt
    aliases: list[list[int]]
    """Token ids of the gold answers that are scored."""
    baseline: AnswerScore | None = None
    """The gold answer's score after the prompt alone; None where nothing is scored."""
    begun: int | None = None
    """Version of the weights with which the group began; None: the present ones."""


@dataclass(kw_only=True)
class LiveTrajectory:
    """A trajectory in play."""

    group: PromptGroup
    trajectory: Trajectory
    tokens: TokenIds
    """The whole sequence so far."""
    scores: list[AnswerScore] = field(default_factory=list)
    """The gold answer's score after each process turn."""
    open_call: tuple[str, str] = ("", "")
    """Tool and query of the pending call."""
    num_known: int = 0
    """Tokens of the sequence that the engine has computed."""
    budget: int | None = None
    """Sampled tokens in this call after which no further turn begins; None: no bound."""
    num_past_turns: int = 0
    """Turns played by earlier calls."""

    @property
    def start_order(self) -> tuple[bool, bool, int]:
        """Sort key that puts first the trajectories that may take longest.

        Trajectories without a budget come first, then those begun by earlier calls, then questions with the most
        hops, if the question set gives their number.
        """
        return self.budget is not None, self.num_past_turns == 0, -self.trajectory.hops

    @property
    def new_turns(self) -> list[Turn]:
        """The turns played by this call."""
        return self.trajectory.turns[self.num_past_turns :]

    @property
    def contexts(self) -> list[AnswerScore]:
        """The gold answer's scores after the prompt and after each process turn; empty where nothing is scored."""
        return [] if self.group.baseline is None else [self.group.baseline, *self.scores]

    @property
    def is_scored(self) -> bool:
        """Whether the engine has returned all scores."""
        return not any(score.num_pending for score in self.contexts)

    @property
    def is_spent(self) -> bool:
        """Whether the budget is used up."""
        return self.budget is not None and sum(len(turn.tokens) for turn in self.new_turns) >= self.budget


class MultiTurnLoop:
    """Play trajectories to their end, or until their budget is used up.

    Args:
        engine: idle at start and at the end.
        tools: runs the tool calls.
        syntax: syntax of a tool call.
        observations: encodes the tools' answers as tokens.
        stop_tokens: ids that end a turn, in addition to the end of sequence (`PromptTemplate.end_of_turn`).
        scorer: scores the gold answer after every observation; None: no scoring.
        counts: counts this rollout, in addition to what they hold.
    """

    def __init__(
        self,
        engine: VllmEngine,
        *,
        tools: ToolPool,
        syntax: CallSyntax,
        observations: ObservationEncoder,
        stop_tokens: Sequence[int],
        scorer: AnswerScorer | None,
        limits: Limits,
        sampling: Sampling,
        counts: RolloutCounts,
    ):
        self._engine = engine
        self._tools = tools
        self._syntax = syntax
        self._observations = observations
        self._stop_tokens = stop_tokens
        self._scorer = scorer
        self._limits = limits
        self._sampling = sampling
        self._counts = counts
        self._generating: dict[str, LiveTrajectory] = {}
        self._calling: dict[int, LiveTrajectory] = {}
        self._ended: list[LiveTrajectory] = []
        """Trajectories whose last token is sampled, but some of whose scores are still being computed."""
        self._num_requests = 0

    def play(self, live: Sequence[LiveTrajectory]) -> Generator[LiveTrajectory | None, None, None]:
        """Play all of `live`; the engine works whenever any trajectory can continue.

        Trajectories start in `LiveTrajectory.start_order`. A caller may close the iterator after any item; ranks that
        share the engine must close theirs after the same item. Engine and tools then hold no request of this rollout.

        Yields:
            Each trajectory that ends, once all its scores are known; and None, a heartbeat, every `HEARTBEAT_EVERY`
            passes and whenever all trajectories wait for tools. All ranks of the engine get the same items.

        Raises:
            ToolFaultError: if a tool has a bug or hangs too often; engine and tools can then play again.
        """
        try:
            yield from self._play(live)
        except (GeneratorExit, ToolFaultError):
            self._engine.abort_all()
            self._tools.drop_pending()
            raise

    def _play(self, live: Sequence[LiveTrajectory]) -> Generator[LiveTrajectory | None, None, None]:
        waited_before, outage_before = self._tools.waited_s, self._tools.outage.total_s
        for trajectory in sorted(live, key=lambda trajectory: trajectory.start_order):
            self._generate(trajectory)
            if self._scorer is not None:
                self._score_prefix(trajectory, self._scorer)
        passes = 0
        while self._engine.has_unfinished or self._calling:
            is_waiting = not self._engine.has_unfinished
            if is_waiting or passes % HEARTBEAT_EVERY == 0:
                yield None
            passes += 1
            for result in self._tools.results(wait=is_waiting):
                self._observe(self._calling.pop(result.key), result)
            if self._engine.has_unfinished:
                self._step_engine()
            yield from self._take_finished()
        self._counts.tool_wait_s += self._tools.waited_s - waited_before
        self._counts.outage_s += self._tools.outage.total_s - outage_before
        self._counts.tool_counts.update(self._tools.take_counts())

    def _step_engine(self) -> None:
        for output in self._engine.step():
            if isinstance(output, ScoreOutput):
                assert self._scorer is not None
                self._scorer.collect(output)
            else:
                self._take_turn(self._generating.pop(output.request_id), output)

    def _take_finished(self) -> list[LiveTrajectory]:
        """Remove and return the trajectories that have ended and whose scores are all known."""
        finished = [live for live in self._ended if live.is_scored]
        self._ended = [live for live in self._ended if not live.is_scored]
        return finished

    def _score_prefix(self, live: LiveTrajectory, scorer: AnswerScorer) -> None:
        """Score the gold answer after the prompt, once per group, and in each context that earlier calls played."""
        group = live.group
        if group.baseline is None:
            group.baseline = scorer.submit(live.trajectory, 0, group.aliases)
        for num_turns in range(1, live.trajectory.num_process_turns + 1):
            live.scores.append(scorer.submit(live.trajectory, num_turns, group.aliases))

    def _generate(self, live: LiveTrajectory) -> None:
        room, _ = self._room(live)
        request_id = f"turn-{self._num_requests}"
        self._num_requests += 1
        self._generating[request_id] = live
        trajectory = live.trajectory
        self._engine.submit(
            request_id,
            live.tokens,
            max_tokens=min(room, self._limits.max_turn_tokens),
            seed=self._sampling.turn_seed(live.group, trajectory.sample_index, len(trajectory.turns)),
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            stop=self._syntax.stop_strings,
            stop_tokens=self._stop_tokens,
        )

    def _take_turn(self, live: LiveTrajectory, output: EngineOutput) -> None:
        """Append the sampled turn; then call a tool, or end the trajectory."""
        turn = Turn(
            tokens=TokenIds(output.tokens),
            rollout_logprobs=LogProbs(output.logprobs),
            version=self._sampling.version,
        )
        live.trajectory.turns.append(turn)
        self._counts.known_prefix_tokens += live.num_known
        self._counts.cached_prefix_tokens += min(output.num_cached_tokens, live.num_known)
        live.tokens.extend(output.tokens)
        live.num_known = len(live.tokens)
        tool = self._syntax.tool_of(output.stop_string)
        if tool is not None:
            self._call(live, tool, self._syntax.find_query(output.text, tool))
        elif output.stop_string is not None:
            self._end(live, "answer")
        elif output.finish_reason == "length":
            room, limit = self._room(live)
            self._end(live, limit if room < 1 else "length")
        else:
            self._end(live, "eos")

    def _call(self, live: LiveTrajectory, tool: str, query: str) -> None:
        room, limit = self._room(live)
        if not query:
            self._counts.empty_queries += 1
            self._end(live, "empty_query")
        elif live.trajectory.num_process_turns >= self._limits.max_turns:
            self._end(live, "max_turns")
        elif room - MIN_TURN_TOKENS < self._observations.min_tokens:
            self._end(live, limit)
        else:
            live.open_call = tool, query
            self._counts.tool_calls += 1
            self._calling[self._tools.submit(tool, query)] = live

    def _observe(self, live: LiveTrajectory, result: ToolResult) -> None:
        """Append the observation, continue generating, and score the gold answer in the new context."""
        tool, query = live.open_call
        if result.error is None:
            tokens = self._observations.encode(result.parts)
        else:
            tokens = self._observations.encode_failure(tool, result.error)
            self._counts.failed_calls += 1
            self._counts.hung_calls += result.is_late
        room, _ = self._room(live)
        fitted = self._observations.fit(tokens, room - MIN_TURN_TOKENS)
        self._counts.truncated_observations += len(fitted) < len(tokens)
        turn = live.trajectory.turns[-1]
        turn.tool, turn.query = tool, query
        turn.tool_failed = result.error is not None
        turn.observation_tokens = TokenIds(fitted)
        live.tokens.extend(fitted)
        if live.is_spent:
            self._count_turns(live)
            return
        # Generation first: its prefill computes and caches the observation, so the scoring needs rows of the output
        # head only for the scaffold and the answer.
        self._generate(live)
        if self._scorer is not None:
            num_turns = live.trajectory.num_process_turns
            live.scores.append(self._scorer.submit(live.trajectory, num_turns, live.group.aliases))

    def _room(self, live: LiveTrajectory) -> tuple[int, str]:
        """Return how many tokens may still be appended, and the stop reason once none may."""
        num_response = len(live.tokens) - len(live.group.prompt.tokens)
        response_room = self._limits.max_response_tokens - num_response
        model_room = self._limits.max_model_len - len(live.tokens)
        return min(response_room, model_room), "length" if response_room <= model_room else "context"

    def _end(self, live: LiveTrajectory, reason: str) -> None:
        live.trajectory.stop_reason = reason
        self._count_turns(live)
        self._ended.append(live)

    def _count_turns(self, live: LiveTrajectory) -> None:
        self._counts.sampled_tokens += sum(len(turn.tokens) for turn in live.new_turns)
