"""The rollout on one engine: play groups of trajectories, and score the gold answers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.environment.tool import Toolset
from a2tgpo.io.errors import require
from a2tgpo.lifecycle.outage import Outage
from a2tgpo.parallel.engine_group import ALONE, EngineGroup
from a2tgpo.protocol.protocol import AgentProtocol
from a2tgpo.rollout.answer_scorer import AnswerScorer
from a2tgpo.rollout.answer_tokens import AnswerTokens
from a2tgpo.rollout.carried_group import CarriedGroup, copied
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.inner_branches import TOP_LOGPROBS, InnerBranching
from a2tgpo.rollout.multi_turn import Limits, LiveTrajectory, MultiTurnLoop, PromptGroup, Sampling
from a2tgpo.rollout.tool_pool import ToolFaultError, ToolPool
from a2tgpo.rollout.turn_tree import TreeGrowth
from a2tgpo.trajectory import Prompt, TokenIds, Trajectory

if TYPE_CHECKING:
    from a2tgpo.rollout.vllm_engine import VllmEngine


class RolloutInterruptedError(Exception):
    """Raised if the rollout was interrupted on request. Trajectories that were not yet yielded are lost."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """An ended trajectory, with the values from which its reward and gains are computed."""

    trajectory: Trajectory
    prompt: Prompt
    turn_texts: list[str]
    """The text that the policy wrote in each turn (see `GroupRollout.turn_texts`)."""
    context_logprobs: list[list[list[float]] | None]
    """One entry per context (after the prompt, and after each process turn): the log-probs of the gold answers per
    alias and token, or None if the context has no log-probs. The list is empty if nothing was scored."""


Growth = TreeGrowth | InnerBranching
"""Decides which branches begin after a trajectory has ended."""
Playing = Generator[Finished | None, None, None]
"""A started rollout, which plays while the caller iterates over it (see `GroupRollout.play`)."""


class GroupRollout:
    """Play groups of trajectories on one engine.

    Args:
        toolset: the tools that the policy may call. The caller must close the tools.
        protocol: the protocol for the tools of `toolset`.
        engine_group: the ranks that share the engine.
    """

    def __init__(
        self,
        engine: VllmEngine,
        toolset: Toolset,
        protocol: AgentProtocol,
        *,
        rollout: RolloutConfig,
        engine_group: EngineGroup = ALONE,
    ):
        require(
            rollout.tensor_parallel == engine_group.size,
            "rollout.tensor_parallel",
            rollout.tensor_parallel,
            "the number of ranks that share an engine",
        )
        self._engine = engine
        self.protocol = protocol
        self._config = rollout
        self.answer_tokens = AnswerTokens(protocol, rollout.gain)
        self._tools = ToolPool(toolset, engine_group=engine_group)
        self._engine_group = engine_group

    def play(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        version: int,
        greedy: bool = False,
        group_size: int | None = None,
        score_gain: bool = True,
        skip: Container[tuple[int, int]] = (),
        queue: Iterable[Prompt] = (),
        counts: RolloutCounts | None = None,
    ) -> Playing:
        """Start a rollout of `group_size` trajectories per prompt.

        All ranks of the engine must iterate in the same way, usually with `finished`.

        Args:
            prompts: the prompts that this engine plays, possibly none.
            seed: seed of the run. Seed, version, prompt and sample together determine every sampled token.
            version: version of the weights (`Turn.version`).
            greedy: whether to always take the most probable token, as evaluation does.
            group_size: number of trajectories per prompt, all played from the prompt. None: `rollout.group_size`
                trajectories, some of which are branches if `rollout.tree` is on, and in addition
                `rollout.inner_branches` inner branches.
            score_gain: whether to score the gold answer in every context.
            skip: pairs (index of the prompt, sample) of trajectories that are not played.
            queue: further prompts. The engine takes the next one whenever it has a free slot, that is, whenever it
                generates fewer than `rollout.max_concurrent` trajectories. Without `prompts`, it takes none. All
                ranks of the engine must get the same prompts.
            counts: receives the counts of this rollout.

        Yields:
            Each trajectory when it has finished, and None as a heartbeat (see `MultiTurnLoop.play`).

        Raises:
            ConfigError: raised by the call, if a prompt leaves no room for one token.
            RuntimeError: raised by the iterator, if the engine fails, or if a tool has a bug or hangs too often.
        """
        growth, size = None, group_size or self._config.group_size
        if group_size is None:
            growth = self._growth(seed=f"{seed}|{version}")
            size = self._config.tree.initial or size

        def begun(some: Sequence[Prompt]) -> list[LiveTrajectory]:
            return [
                _live(group, _start(group.prompt, sample))
                for group in self._groups(some, score_gain=score_gain)
                for sample in range(size)
                if (group.prompt.index, sample) not in skip
            ]

        sampling = Sampling(
            temperature=0.0 if greedy else self._config.temperature,
            top_p=1.0 if greedy else self._config.top_p,
            seed=seed,
            version=version,
            top_logprobs=TOP_LOGPROBS if isinstance(growth, InnerBranching) else 0,
        )
        return self._play(
            begun(prompts),
            sampling,
            score_gain=score_gain,
            counts=counts or RolloutCounts(),
            growth=growth,
            later=(begun([prompt]) for prompt in queue),
        )

    def play_on(
        self,
        groups: Sequence[CarriedGroup],
        *,
        budgets: Sequence[int | None],
        seed: int,
        version: int,
        score_gain: bool = True,
        counts: RolloutCounts | None = None,
    ) -> tuple[list[CarriedGroup], Playing]:
        """Begin or continue the unfinished trajectories of `groups`.

        All ranks of the engine must iterate in the same way. Earlier turns keep their tokens. The gold answer is
        scored again in all contexts, so that both probabilities of every gain come from the current policy.

        Args:
            groups: the groups that this engine plays. They are not changed.
            budgets: for each group, the number of sampled tokens after which a trajectory begins no further turn in
                this rollout. None means that the trajectory is played to its end.
            seed, version, score_gain, counts: as in `play`. Until the weights change, a group draws the same samples
                as in `play`.

        Returns:
            The continued groups, and an iterator like that of `play`. The trajectories of these groups grow while the
            caller consumes the iterator.
        """
        live: list[LiveTrajectory] = []
        played: list[CarriedGroup] = []
        prompt_groups = self._groups([group.prompt for group in groups], score_gain=score_gain)
        for group, shared, budget in zip(groups, prompt_groups, budgets, strict=True):
            shared.begun = group.begun
            members = group.trajectories or [
                _start(group.prompt, sample) for sample in range(self._config.group_size)
            ]
            members = [member if member.stop_reason else copied(member) for member in members]
            live += [_live(shared, member, budget) for member in members if not member.stop_reason]
            played.append(dataclasses.replace(group, trajectories=members))
        sampling = Sampling(
            temperature=self._config.temperature, top_p=self._config.top_p, seed=seed, version=version
        )
        return played, self._play(live, sampling, score_gain=score_gain, counts=counts or RolloutCounts())

    def finished(
        self, playing: Playing, *, should_stop: Callable[[], bool] | None = None
    ) -> Iterator[Finished]:
        """Yield the trajectories that `playing` finishes, and decide at each heartbeat whether to continue.

        Args:
            playing: the iterator that `play` or `play_on` returned.
            should_stop: returns whether to interrupt the rollout. It must return True if an `outage` has reached its
                limit. If it returns True on any rank, the rollout is interrupted on all ranks of the engine. None:
                never interrupt.

        Raises:
            RolloutInterruptedError: on all ranks of the engine, if the rollout is interrupted.
            ToolFaultError: on all ranks of the engine, if an outage reaches its limit and `should_stop` is None.
        """
        with contextlib.closing(playing):
            for done in playing:
                if done is not None:
                    yield done
                elif should_stop is not None:
                    if self._engine_group.any(should_stop()):
                        raise RolloutInterruptedError
                elif self._engine_group.any(bool(self.outage.verdict)):
                    raise ToolFaultError(self.outage.verdict or "a tool's service does not come back")

    def _play(
        self,
        live: Sequence[LiveTrajectory],
        sampling: Sampling,
        *,
        score_gain: bool,
        counts: RolloutCounts,
        growth: Growth | None = None,
        later: Iterable[list[LiveTrajectory]] = (),
    ) -> Playing:
        waiting = iter(later)
        loop = MultiTurnLoop(
            self._engine,
            tools=self._tools,
            protocol=self.protocol,
            scorer=AnswerScorer(self._engine, self.answer_tokens, counts) if score_gain else None,
            limits=self._limits,
            sampling=sampling,
            counts=counts,
        )
        with contextlib.closing(loop.play(live)) as playing:
            for done in playing:
                if growth is not None and done is not None:
                    loop.begin(growth.branches_after(done))
                # In an outage no trajectory continues, so free slots do not mean that the engine is faster.
                while not self.outage.is_on and loop.num_generating < self._config.max_concurrent:
                    if (group := next(waiting, None)) is None:
                        break
                    loop.begin(group)
                    counts.taken_groups += 1
                yield None if done is None else self._finished(done)

    @property
    def _limits(self) -> Limits:
        return Limits(
            max_turns=self._config.max_turns,
            max_turn_tokens=self._config.max_turn_tokens,
            max_response_tokens=self._config.max_response_tokens,
            max_model_len=self._engine.max_model_len,
        )

    def _growth(self, *, seed: str) -> Growth | None:
        """Return what decides on the branches of a training rollout, or None if the rollout has no branches."""
        tree, count, size = self._config.tree, self._config.inner_branches, self._config.group_size
        if count:
            return InnerBranching(count, group_size=size, limits=self._limits, protocol=self.protocol)
        return TreeGrowth(tree, group_size=size, seed=seed) if tree.is_on else None

    def _finished(self, live: LiveTrajectory) -> Finished:
        return Finished(
            trajectory=live.trajectory,
            prompt=live.group.prompt,
            turn_texts=self.turn_texts(live.trajectory),
            context_logprobs=[score.logprobs for score in live.contexts],
        )

    def turn_texts(self, trajectory: Trajectory) -> list[str]:
        """Return the text that the policy wrote in each turn (see `AgentProtocol.text_of`)."""
        return [self.protocol.text_of(turn.tokens) for turn in trajectory.turns]

    @property
    def outage(self) -> Outage:
        """The state of this engine's wait for a tool's service."""
        return self._tools.outage

    def close(self) -> None:
        """Stop the threads that run tool calls. The caller must close the engine and the toolset."""
        self._tools.close()

    def _groups(self, prompts: Sequence[Prompt], *, score_gain: bool) -> list[PromptGroup]:
        for prompt in prompts:
            require(
                len(prompt.tokens) < self._engine.max_model_len,
                f"length of the prompt of question {prompt.id!r}",
                len(prompt.tokens),
                f"< {self._engine.max_model_len} tokens, the longest context of the engine",
            )
        return [
            PromptGroup(
                prompt=prompt, aliases=self.answer_tokens.aliases(prompt.answers) if score_gain else []
            )
            for prompt in prompts
        ]


def _start(prompt: Prompt, sample_index: int) -> Trajectory:
    return Trajectory(
        prompt_index=prompt.index,
        prompt_id=prompt.id,
        sample_index=sample_index,
        prompt_tokens=TokenIds(prompt.tokens),
        turns=[],
        stop_reason="",
        hops=prompt.hops,
    )


def _live(group: PromptGroup, trajectory: Trajectory, budget: int | None = None) -> LiveTrajectory:
    return LiveTrajectory(
        group=group,
        trajectory=trajectory,
        tokens=trajectory.tokens,
        budget=budget,
        num_past_turns=len(trajectory.turns),
    )
