"""The event loop of a rollout. All trajectories play at once, and each pauses only for its own tool calls.

A trajectory ends with one of these stop reasons:

    answer       The trajectory gave an answer in the form of the protocol.
    eos          The policy ended the sequence, or its turn in the chat template, without giving an answer.
    length       The trajectory used up the token budget of the turn or of the response.
    context      The trajectory reached the longest sequence that the engine allows.
    max_turns    The trajectory called a tool after the last allowed process turn.
    empty_query  The trajectory called a tool with an empty query.

The turn in which a trajectory ends is its final turn. A final turn has neither calls nor an observation.

A trajectory with a budget may also pause after an observation. A paused trajectory has no stop reason, and a later
rollout continues it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from a2tgpo.protocol.protocol import AgentProtocol, CallResult
from a2tgpo.rollout.answer_scorer import AnswerScore, AnswerScorer
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.engine_output import EngineOutput, ScoreOutput
from a2tgpo.rollout.tool_pool import ToolFaultError, ToolPool, ToolResult
from a2tgpo.rollout.tool_sessions import TrajectorySessions
from a2tgpo.trajectory import Call, LogProbs, Prompt, TokenIds, Trajectory, Turn

if TYPE_CHECKING:
    from a2tgpo.rollout.vllm_engine import VllmEngine

HEARTBEAT_EVERY = 16
"""Number of passes between two heartbeats while the engine has work."""
MIN_TURN_TOKENS = 32
"""Number of tokens that an observation must leave free for another turn."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_turns: int
    max_turn_tokens: int
    max_response_tokens: int
    max_model_len: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float
    """0 means greedy sampling."""
    top_p: float
    seed: int
    version: int
    """Version of the weights (see `Turn.version`)."""
    top_logprobs: int = 0
    """Number of log-probs per token from which entropies are estimated; 0: no entropies."""

    def turn_seed(self, group: PromptGroup, sample_index: int, turn_index: int) -> int | None:
        """Return the seed of one generation. It does not depend on the rank, the time or other requests."""
        if self.temperature == 0:
            return None
        prompt = group.prompt
        name = f"{self.seed}|{self.version}|{prompt.index}|{prompt.id}|{sample_index}|{turn_index}"
        if group.begun not in (None, self.version):  # a new prompt of this step may have the same index
            name += f"|{group.begun}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1  # vLLM's seed is a signed 64-bit number


@dataclass(kw_only=True)
class PromptGroup:
    """The data that all trajectories of one prompt share."""

    prompt: Prompt
    aliases: list[list[int]]
    """Token ids of the gold answers to score."""
    baseline: AnswerScore | None = None
    """Score of the gold answer after the prompt. None if nothing is scored."""
    begun: int | None = None
    """Version of the weights with which the group began. None means the current version."""


@dataclass(kw_only=True)
class LiveTrajectory:
    group: PromptGroup
    trajectory: Trajectory
    tokens: TokenIds
    scores: list[AnswerScore] = field(default_factory=list)
    """Scores of the gold answer after each process turn."""
    results: list[CallResult] = field(default_factory=list)
    """The calls of the last turn, with the results that have arrived, in the order of the calls."""
    num_open_calls: int = 0
    """Number of calls of the last turn whose result has not arrived."""
    sessions: TrajectorySessions | None = None
    """The trajectory's sessions, if the rollout has tools with sessions."""
    num_known: int = 0
    """Number of tokens of the sequence that the engine has already computed."""
    budget: int | None = None
    """After this many sampled tokens in this rollout, the trajectory begins no further turn. None means no limit."""
    num_past_turns: int = 0
    """Number of turns that were played in earlier rollouts, or by trajectories from which this one branched off."""
    opening: Turn = field(default_factory=lambda: Turn(tokens=TokenIds(), rollout_logprobs=LogProbs()))
    """The beginning of the first turn of this rollout, which an inner branch shares with its parent. Otherwise
    empty."""
    entropies: list[list[float]] = field(default_factory=list)
    """For each turn of this rollout, the entropies of the distributions from which its tokens were sampled, in nats.
    The lists are empty if no entropies are estimated."""

    @property
    def start_order(self) -> tuple[bool, bool, int]:
        """A sort key. The trajectories that may take longest come first.

        The first criterion is that the trajectory has no budget, the second that it has past turns, and the third
        that its question needs many hops.
        """
        return self.budget is not None, self.num_past_turns == 0, -self.trajectory.hops

    @property
    def new_turns(self) -> list[Turn]:
        return self.trajectory.turns[self.num_past_turns :]

    @property
    def num_sampled(self) -> int:
        """Number of tokens that this rollout has sampled."""
        shared = len(self.opening.tokens) if self.new_turns else 0
        return sum(len(turn.tokens) for turn in self.new_turns) - shared

    @property
    def is_inner(self) -> bool:
        """Whether the trajectory is an inner branch (`rollout.inner_branches`). Its gains are not measured."""
        return bool(self.opening.tokens)

    @property
    def contexts(self) -> list[AnswerScore]:
        """Scores of the gold answer after the prompt and after each process turn. Empty if nothing is scored."""
        baseline = self.group.baseline
        return [] if baseline is None or self.is_inner else [baseline, *self.scores]

    @property
    def is_scored(self) -> bool:
        """Whether the engine has returned all scores of this trajectory."""
        return not any(score.num_pending for score in self.contexts)

    @property
    def is_spent(self) -> bool:
        """Whether this rollout has used up the trajectory's budget."""
        return self.budget is not None and self.num_sampled >= self.budget


class MultiTurnLoop:
    """Play trajectories until they end or have used up their budget.

    Args:
        engine: the engine. It must have no request when a rollout starts, and has none when the rollout ends.
        protocol: reads the policy's turns, and writes the observations.
        scorer: scores the gold answer after every observation. None means that nothing is scored.
        counts: receives the counts of this rollout.
    """

    def __init__(
        self,
        engine: VllmEngine,
        *,
        tools: ToolPool,
        protocol: AgentProtocol,
        scorer: AnswerScorer | None,
        limits: Limits,
        sampling: Sampling,
        counts: RolloutCounts,
    ):
        self._engine = engine
        self._tools = tools
        self._protocol = protocol
        self._scorer = scorer
        self._limits = limits
        self._sampling = sampling
        self._counts = counts
        self._generating: dict[str, LiveTrajectory] = {}
        self._calling: dict[int, tuple[LiveTrajectory, int]] = {}
        """For each call in progress, its trajectory and its place among the calls of the turn."""
        self._ended: list[LiveTrajectory] = []
        """Trajectories that have ended but may still wait for scores."""
        self._num_requests = 0

    def play(self, live: Sequence[LiveTrajectory]) -> Generator[LiveTrajectory | None, None, None]:
        """Play all trajectories in `live`, and start them in the order of `LiveTrajectory.start_order`.

        The caller may close the iterator after any item. All ranks of the engine must then close their iterators
        after the same item. After that, the engine and the tools work on no request of this rollout.

        Yields:
            Each trajectory that has ended, as soon as all its scores are known; or `None`, a heartbeat, every
            `HEARTBEAT_EVERY` passes, and while all trajectories wait for tools. All ranks of the engine get the same
            items.

        Raises:
            ToolFaultError: if a tool has a bug or hangs too often. Engine and tools are usable after this error.
        """
        try:
            yield from self._play(live)
        except (GeneratorExit, ToolFaultError):
            self._engine.abort_all()
            self._tools.drop_pending()
            raise

    @property
    def num_generating(self) -> int:
        """Number of trajectories with a turn that the engine generates or has queued. Trajectories that wait for a
        tool do not count."""
        return len(self._generating)

    def begin(self, live: Sequence[LiveTrajectory]) -> None:
        """Start trajectories. The caller of `play` may begin further trajectories whenever `play` has yielded.

        All ranks of the engine must begin the same trajectories after the same item.
        """
        for trajectory in sorted(live, key=lambda trajectory: trajectory.start_order):
            past_calls = [call for turn in trajectory.trajectory.turns for call in turn.calls]
            trajectory.sessions = self._tools.sessions_for(trajectory.group.prompt, past_calls)
            self._generate(trajectory)
            if self._scorer is not None and not trajectory.is_inner:
                self._score_prefix(trajectory, self._scorer)

    def _play(self, live: Sequence[LiveTrajectory]) -> Generator[LiveTrajectory | None, None, None]:
        waited_before, outage_before = self._tools.waited_s, self._tools.outage.total_s
        self.begin(live)
        passes = 0
        while self._engine.has_unfinished or self._calling:
            is_waiting = not self._engine.has_unfinished
            if is_waiting or passes % HEARTBEAT_EVERY == 0:
                yield None
            passes += 1
            for result in self._tools.results(wait=is_waiting):
                self._take_result(*self._calling.pop(result.key), result)
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
        """Remove and return the ended trajectories whose scores are all known."""
        finished = [live for live in self._ended if live.is_scored]
        self._ended = [live for live in self._ended if not live.is_scored]
        return finished

    def _score_prefix(self, live: LiveTrajectory, scorer: AnswerScorer) -> None:
        """Score the gold answer in the contexts that precede this rollout's first turn and have no score yet.

        The prompt alone, as a context, is scored once per group. A branch has the scores of the turns that it shares.
        """
        group = live.group
        if group.baseline is None:
            group.baseline = scorer.submit(live.trajectory, 0, group.aliases)
        for num_turns in range(len(live.scores) + 1, live.trajectory.num_process_turns + 1):
            live.scores.append(scorer.submit(live.trajectory, num_turns, group.aliases))

    def _generate(self, live: LiveTrajectory) -> None:
        room, _ = self._room(live)
        request_id = f"turn-{self._num_requests}"
        self._num_requests += 1
        self._generating[request_id] = live
        trajectory = live.trajectory
        num_begun = 0 if live.new_turns else len(live.opening.tokens)
        self._engine.submit(
            request_id,
            live.tokens,
            max_tokens=min(room, self._limits.max_turn_tokens - num_begun),
            seed=self._sampling.turn_seed(live.group, trajectory.sample_index, len(trajectory.turns)),
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            stop=self._protocol.stop_strings,
            stop_tokens=self._protocol.stop_tokens,
            top_logprobs=self._sampling.top_logprobs,
            # If this rollout has played a turn, the rows up to that turn's last token but one have been returned.
            experts_from=max(0, live.num_known - 1),
        )

    def _take_turn(self, live: LiveTrajectory, output: EngineOutput) -> None:
        """Append the sampled turn to the trajectory. Then call a tool or end the trajectory."""
        tokens, logprobs, text = TokenIds(output.tokens), LogProbs(output.logprobs), output.text
        if live.is_inner and not live.new_turns:
            tokens = TokenIds(live.opening.tokens + tokens)
            logprobs = LogProbs(live.opening.rollout_logprobs + logprobs)
            text = self._protocol.text_of(live.opening.tokens) + text
        turn = Turn(
            tokens=tokens,
            rollout_logprobs=logprobs,
            version=self._sampling.version,
            experts=b"" if live.is_inner else output.experts,  # no step trains on inner branches
        )
        if turn.experts and not live.num_known:
            # The rows begin at position 0, and replace the rows of turns that earlier rollouts played.
            past = [dataclasses.replace(earlier, experts=b"") for earlier in live.trajectory.turns]
            live.trajectory.turns[:] = past
        live.trajectory.turns.append(turn)
        self._counts.known_prefix_tokens += live.num_known
        self._counts.cached_prefix_tokens += min(output.num_cached_tokens, live.num_known)
        live.tokens.extend(output.tokens)
        live.num_known = len(live.tokens)
        live.entropies.append(output.entropies)
        parsed = self._protocol.parse(
            text, finish_reason=output.finish_reason, stop_string=output.stop_string
        )
        if parsed.calls:
            self._call(live, parsed.calls)
            return
        reason = parsed.stop_reason
        self._counts.empty_queries += reason == "empty_query"
        room, limit = self._room(live)
        self._end(live, limit if reason == "length" and room < 1 else reason)

    def _call(self, live: LiveTrajectory, calls: Sequence[Call]) -> None:
        """Start all calls of a turn, so that they run at the same time."""
        room, limit = self._room(live)
        if live.trajectory.num_process_turns >= self._limits.max_turns:
            self._end(live, "max_turns")
        elif room - MIN_TURN_TOKENS < self._protocol.min_observation_tokens(len(calls)):
            self._end(live, limit)
        else:
            live.results = [CallResult(call=call) for call in calls]
            for place, call in enumerate(calls):
                if call.problem is None:
                    live.num_open_calls += 1
                    self._counts.tool_calls += 1
                    self._calling[self._tools.submit(call.tool, call.arguments, live.sessions)] = live, place
            if not live.num_open_calls:
                self._observe(live)

    def _take_result(self, live: LiveTrajectory, place: int, result: ToolResult) -> None:
        """Store the result of one call. If no other call of the turn is open, append the observation."""
        call = live.results[place].call
        if result.error is not None:
            self._counts.failed_calls += 1
            self._counts.hung_calls += result.is_late
            call = dataclasses.replace(call, failed=True)
        live.results[place] = CallResult(
            call=call, parts=result.parts, error=result.error, score=result.score
        )
        live.num_open_calls -= 1
        if not live.num_open_calls:
            self._observe(live)

    def _observe(self, live: LiveTrajectory) -> None:
        """Append the observation, start the next generation, and score the gold answer in the new context."""
        room, _ = self._room(live)
        observation = self._protocol.observe(live.results, room=room - MIN_TURN_TOKENS)
        self._counts.truncated_observations += observation.is_shortened
        turn = live.trajectory.turns[-1]
        turn.calls = [result.call for result in live.results]
        scores = [result.score for result in live.results if result.score is not None]
        turn.score = sum(scores) if scores else None
        turn.observation_tokens = TokenIds(observation.tokens)
        live.tokens.extend(observation.tokens)
        if live.is_spent:
            self._count_turns(live)
            self._tools.end(live.sessions)
            return
        # Submit the generation first. Its prefill caches the observation, so the scoring has to compute only the
        # scaffold and the answer.
        self._generate(live)
        if self._scorer is not None and not live.is_inner:
            num_turns = live.trajectory.num_process_turns
            live.scores.append(self._scorer.submit(live.trajectory, num_turns, live.group.aliases))

    def _room(self, live: LiveTrajectory) -> tuple[int, str]:
        """Return how many tokens may still be appended, and the stop reason if no token may be appended."""
        num_response = len(live.tokens) - len(live.group.prompt.tokens)
        response_room = self._limits.max_response_tokens - num_response
        model_room = self._limits.max_model_len - len(live.tokens)
        return min(response_room, model_room), "length" if response_room <= model_room else "context"

    def _end(self, live: LiveTrajectory, reason: str) -> None:
        live.trajectory.stop_reason = reason
        self._count_turns(live)
        self._tools.end(live.sessions)
        self._ended.append(live)

    def _count_turns(self, live: LiveTrajectory) -> None:
        self._counts.sampled_tokens += live.num_sampled
